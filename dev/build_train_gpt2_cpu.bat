@echo off
rem Builds the C++ program train_gpt2 with Visual Studio's compiler and runs it in this folder, as llm.c's quick start does.
rem Needs Visual Studio 2022 or newer, or its Build Tools, with the C++ tools; works from any command prompt.
rem
rem It wants gpt2_124M.bin, gpt2_tokenizer.bin and dev\data\tinyshakespeare\*.bin in the current folder. Without a network:
rem   python -m llmc.reference --model d12 --input_bin dev/data/tinyshakespeare/tiny_shakespeare_val.bin   (writes gpt2_d12.bin)
rem   dev\build_train_gpt2_cpu.bat -e gpt2_d12.bin
rem Arguments go to train_gpt2.

rem A "!" in a path is a character like others.
setlocal EnableExtensions DisableDelayedExpansion
for %%I in ("%~dp0..") do set "source=%%~fI"
set "build=%source%\build\apps"
if defined LLMC_BUILD_DIR set "build=%LLMC_BUILD_DIR%"

rem Visual Studio brings a CMake, which knows it; an older one on the PATH may not.
set "PATH=%PATH%;%ProgramFiles(x86)%\Microsoft Visual Studio\Installer"
set "studio="
set "tools=Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
for /f "delims=" %%I in ('vswhere -latest -products * -requires %tools% -property installationPath 2^>nul') do set "studio=%%I"
if defined studio set "PATH=%studio%\Common7\IDE\CommonExtensions\Microsoft\CMake\CMake\bin;%PATH%"
if not defined studio echo No Visual Studio with the workload "Desktop development with C++" was found. 1>&2

cmake -S "%source%" -B "%build%" -DLLMC_PYTHON=OFF -DLLMC_BUILD_APPS=ON || exit /b 1
cmake --build "%build%" --config Release --parallel --target train_gpt2 || exit /b 1
set "program=%build%\Release\train_gpt2.exe"
if not exist "%program%" set "program=%build%\train_gpt2.exe"
"%program%" %*
exit /b %errorlevel%

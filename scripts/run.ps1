# Trains one of the configurations beside this file, and resumes it whenever it ends before its last step:
#   scripts\run.ps1 gpt2_124M [more flags of llmc-train]
# By llmc-train, or by the Python that $env:PYTHON names (python) if that is set or there is no llmc-train on the PATH.
# Ends with the run's exit code when it is done (0), when a setting or file name is wrong (2), when a signal stopped it (130, 143,
# 149), and when it ended otherwise without one new checkpoint since it was started: it would again.
# No param block: PowerShell would take -n, -d and others of llmc-train's flags for parameters of this script.
$Name = "$($args[0])"
$Flags = @($args | Select-Object -Skip 1)
$File = Join-Path $PSScriptRoot "$Name.toml"
if (-not $Name -or $Name -like 'sweep_*' -or -not (Test-Path -LiteralPath $File)) {
    $Names = Get-ChildItem -Path $PSScriptRoot -Filter *.toml | Where-Object Name -NotLike 'sweep_*' | ForEach-Object BaseName
    [Console]::Error.WriteLine("run.ps1: which run? $Names")
    exit 2
}

$Folder = (Select-String -LiteralPath $File -Pattern '^output_dir = "(.*)"$').Matches[0].Groups[1].Value
for ($i = 0; $i -lt $Flags.Count; $i++) {
    if ('-o', '--output-dir' -ccontains $Flags[$i] -and $i + 1 -lt $Flags.Count) { $Folder = $Flags[$i + 1] }
    if ($Flags[$i] -clike '--output-dir=*') { $Folder = "$($Flags[$i])".Substring(13) }
}
function Get-Newest { Get-ChildItem -LiteralPath $Folder -Filter DONE_* -ErrorAction SilentlyContinue | Sort-Object Name | Select-Object -Last 1 }

$Program, $Before = 'llmc-train', @()
if ($env:PYTHON -or -not (Get-Command llmc-train -ErrorAction SilentlyContinue)) {
    $Program = if ($env:PYTHON) { $env:PYTHON } else { 'python' }
    $Before = @('-m', 'llmc', 'train')
}

while ($true) {
    $Checkpoint = (Get-Newest).Name
    & $Program @Before --config $File @Flags
    $Code = $LASTEXITCODE
    if (0, 2, 130, 143, 149 -contains $Code) { exit $Code }
    if ((Get-Newest).Name -eq $Checkpoint) {
        [Console]::Error.WriteLine("run.ps1: ended with $Code and no new checkpoint in ${Folder}: not started again")
        exit $Code
    }
    Start-Sleep -Seconds 1
}

# Trains one of the configurations beside this file, and resumes it whenever it ends before its last step:
#   scripts\run.ps1 gpt2_124M [more flags of llmc-train]
# Ends when the run is done, was stopped by a signal, or cannot start (exit code 2).
param([Parameter(Mandatory = $true)][string]$Name, [Parameter(ValueFromRemainingArguments = $true)][string[]]$Flags = @())
do {
    llmc-train --config (Join-Path $PSScriptRoot "$Name.toml") @Flags
    $code = $LASTEXITCODE
    if (0, 2, 130, 143 -contains $code) { exit $code }
    Start-Sleep -Seconds 1
} while ($true)

# MorphTrain's completion for fish.
function __morphtrain_is_typed
    set -l words (commandline -opc)
    test (string replace --regex ".*/" "" -- $words[1]) = morphtrain
    or begin
        test "$words[2]" = -m
        and string match -q 'morphtrain*' -- "$words[3]" (commandline -ct)
    end
end
function __morphtrain
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l ask $words[1] -m morphtrain.completion
    if test (string replace --regex ".*/" "" -- $words[1]) = morphtrain
        set ask $words[1] completion
    end
    # Nothing of the current directory is imported before the user has typed return.
    set -l found (PYTHONSAFEPATH=1 $ask query -- $words "$current" 2> /dev/null)
    if test -n "$found"
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end
for name in NAMES
    complete --command $name --condition __morphtrain_is_typed --no-files --arguments '(__morphtrain)'
end

# MorphTrain's completion for zsh.
_morphtrain() {
    local -a typed ask found
    typed=("${(@)words[1,CURRENT-1]}" "$PREFIX")
    if [[ ${words[1]:t} == morphtrain ]]; then
        ask=("${words[1]/#\~/$HOME}" completion)
    elif [[ ${typed[2]} == -m && ${typed[3]} == morphtrain* ]]; then
        ask=("${words[1]/#\~/$HOME}" -m morphtrain.completion)
    else
        (( $+functions[_python] )) && _python || _files
        return
    fi
    # Nothing of the current directory is imported before the user has typed return.
    found=("${(@f)$(PYTHONSAFEPATH=1 "${ask[@]}" query -- "${typed[@]}" 2> /dev/null)}")
    found=(${found:#})
    if (( $#found )); then
        compadd -S '' -- ${(M)found:#*[=./]}
        compadd -- ${found:#*[=./]}
    else
        _files
    fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _morphtrain NAMES

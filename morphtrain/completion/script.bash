# MorphTrain's completion for bash.
_morphtrain() {
    local line=${COMP_LINE:0:COMP_POINT} word marks start= found
    local -a words ask
    COMPREPLY=()
    read -r -a words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    ask=("${words[0]/#\~/$HOME}")
    case ${words[0]##*/} in
        morphtrain) ask+=(completion) ;;
        *)
            [[ ${words[1]-} == -m && ${words[2]-} == morphtrain* ]] || return 0
            ask+=(-m morphtrain.completion)
            ;;
    esac
    # Bash replaces only what follows these.
    word=${words[${#words[@]} - 1]}
    marks=${COMP_WORDBREAKS//[^=:]/}
    [[ $marks ]] && start=${word%"${word##*[$marks]}"}
    # Nothing of the current directory is imported before the user has typed return.
    while IFS= read -r found; do
        found=${found#"$start"}
        [[ $found ]] && printf -v found '%q' "$found" && COMPREPLY+=("$found")
    done < <(PYTHONSAFEPATH=1 "${ask[@]}" query -- "${words[@]}" 2> /dev/null)
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *[=./] ]] && compopt +o nospace 2> /dev/null
    return 0
}
complete -o nospace -o default -o bashdefault -F _morphtrain NAMES

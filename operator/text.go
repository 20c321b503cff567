package operator

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
)

// Printable returns a text of one line and of most bytes at most, for a terminal: others may have chosen it.
func Printable(text string, most int) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "..."
	}
	return text
}

// PrintableLines is Printable for a text of several lines, which may be of columns with tabs between them.
func PrintableLines(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) && r != '\n' && r != '\t' {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
}

// escaped returns JSON that commands no terminal and means the same. encoding/json escapes the control characters below
// U+0020 alone; there are those from U+007F to U+009F, too, which YAML refuses.
func escaped(json []byte) []byte {
	return controls.ReplaceAllFunc(json, func(c []byte) []byte { return fmt.Appendf(nil, `\u%04x`, []rune(string(c))[0]) })
}

// controls are within strings: JSON has none of them elsewhere.
var controls = regexp.MustCompile("[\u007f-\u009f]")

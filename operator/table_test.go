package operator

import (
	"bytes"
	"strings"
	"testing"
)

func TestATableKeepsItsColumns(t *testing.T) {
	var out bytes.Buffer
	var tab table
	for _, rows := range [][][]string{{{"a", "b", "c"}}, {{"longer", "ü", "x"}}, {{"s", "t", "u"}}, {{"alone"}}} {
		header := ""
		if out.Len() == 0 {
			header = "ONE TWO THREE"
		}
		if err := tab.write(&out, header, rows); err != nil {
			t.Fatal(err)
		}
	}
	want := "ONE   TWO   THREE\na     b     c\nlonger   ü     x\ns        t     u\nalone\n"
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

// A node writes its own record, and reads nothing of what an operator has on the screen: a terminal obeys what begins
// with ESC (titles, answers that are typed into the shell, lines that are rewritten).
func TestWhatOthersWroteCommandsNoTerminal(t *testing.T) {
	var out bytes.Buffer
	rows := [][]string{{"node-1", "one\x1b]0;owned\x07\nnode-2 is well\r\x9b2K\u202e"}}
	if err := writeTable(&out, "", rows); err != nil {
		t.Fatal(err)
	}
	if out.String() != "node-1   one?]0;owned?; node-2 is well??2K?\n" {
		t.Errorf("%q", out.String())
	}
	out.Reset()
	used := Used{Holders: []Holder{{Node: "node-1\x1b[2J", Egress: "web"}}, Missing: []string{"the agent says \x1bc"}}
	if err := used.text(&out); err != nil || strings.Contains(out.String(), "\x1b") || strings.Count(out.String(), "\n") != 2 {
		t.Errorf("%v, %q", err, out.String())
	}
	if got := nobody("node-1\x1b[2J"); got != "node-1?[2J" {
		t.Errorf("a node is named %q", got)
	}
	if rows[0][1] == out.String() || !strings.Contains(rows[0][1], "\x1b") {
		t.Error("the rows of the caller were changed")
	}
}

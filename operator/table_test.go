package operator

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode"

	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
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

// What a script reads is what a person has on the screen while the script is written.
func TestWhatOthersWroteCommandsNoTerminalInAnyFormat(t *testing.T) {
	const evil = "n\x1b]0;owned\x07\u009b2K\u0085\x7f\u202e\U000e0001é"
	all := store.Everything{Snapshot: egress.Snapshot{
		Pins: map[netip.Addr]egress.Pin{ip: {IP: ip, Node: evil}}, Cordons: map[string]egress.Cordon{evil: {Node: evil, Why: evil}},
	}}
	for _, format := range []string{"", wide, "name", "json", "yaml", "jsonpath={range .items[*]}{.node}{\"\\t\"}{.why}{\"\\n\"}{end}", "jsonpath={.items}"} {
		for _, kind := range []string{"pins", "cordons"} {
			var out bytes.Buffer
			if err := list(kind, all, time.Now()).write(format, &out); err != nil || out.Len() == 0 {
				t.Errorf("get %s -o %s: %v", kind, format, err)
			}
			for _, r := range out.String() {
				is := unicode.IsPrint
				if format == "json" || format == "yaml" { // which mean the same as the record
					is = func(r rune) bool { return !unicode.IsControl(r) }
				}
				if !is(r) && r != '\n' && r != '\t' {
					t.Errorf("get %s -o %s prints %U in %q", kind, format, r, out.String())
					break
				}
			}
			var records []egress.Cordon
			if format == "json" || format == "yaml" {
				if err := yaml.Unmarshal(out.Bytes(), &records); err != nil || records[0].Node != evil {
					t.Errorf("get %s -o %s: %v, and means something else: %q", kind, format, err, out.String())
				}
			}
		}
	}
	const more = "\n\tand so on"
	text := PrintableLines(objection(&all.Snapshot, MoveConfig{IP: ip, To: "node-2"}).Error() + more)
	if strings.ContainsAny(text, "\x1b\x07\u009b") || !strings.HasSuffix(text, more) {
		t.Errorf("a person is asked %q", text)
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

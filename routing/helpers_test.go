package routing

import (
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// unordered returns the lines sorted: rules of one priority, neighbours and the like come in the order in which they were made.
func unordered(text string) []string {
	return slices.Sorted(strings.Lines(text))
}

// batch gives lines to one process of ip or bridge, and returns what it prints: on an emulated machine a process takes longer than what
// it is started for.
func batch(t *testing.T, program string, lines ...string) string {
	t.Helper()
	f := append(strings.Fields(program), "-batch", "-")
	c := exec.Command(f[0], f[1:]...)
	c.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(f, " "), err, out)
	}
	return string(out)
}

// parts is asked for between two lines, and parted is what ip prints of it.
const parts = "link show dev lo"

var parted = regexp.MustCompile(`(?m)^1: lo: .*\n(?: +.*\n)*`)

// shown is batch with what is printed of each line.
func shown(t *testing.T, program string, lines ...string) []string {
	t.Helper()
	if len(lines) == 0 {
		return nil
	}
	out := batch(t, program, strings.Join(lines, "\n"+parts+"\n"), parts)
	printed := parted.Split(out, -1)
	if len(printed) != len(lines)+1 {
		t.Fatalf("%s printed %d parts, want one for each of %q:\n%s", program, len(printed)-1, lines, out)
	}
	return printed[:len(lines)]
}

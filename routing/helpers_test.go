package routing

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/netns"
)

// unordered returns the lines sorted: rules of one priority, neighbours and the like come in the order in which they
// were made.
func unordered(text string) []string {
	return slices.Sorted(strings.Lines(text))
}

// batch is netns.Batch for a test.
func batch(t *testing.T, program string, lines ...string) string {
	t.Helper()
	out, err := netns.Batch(program, lines...)
	if err != nil {
		t.Fatal(err)
	}
	return out
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

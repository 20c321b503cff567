package need

import (
	"bufio"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
)

// Nowhere reads the lines that needs wrote, of any number of runs, and returns the tests that were skipped and ran in
// none of them, sorted, each with the reason. Records without a single test that ran are an error: then the lines of a
// run were lost, not its tests.
func Nowhere(records io.Reader) ([]string, error) {
	ran, skipped := map[string]bool{}, map[string]string{}
	lines := bufio.NewScanner(records)
	for lines.Scan() {
		what, test, _ := strings.Cut(lines.Text(), " ")
		test, why, _ := strings.Cut(test, ": ")
		switch what {
		case "ran":
			ran[test] = true
		case "skipped":
			skipped[test] = why
		default:
			return nil, errors.New("neither ran nor skipped: " + lines.Text())
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(ran) == 0 {
		return nil, errors.New("no test with a need is recorded to have run: was EGRET_NEEDS set?")
	}
	var nowhere []string
	for _, test := range slices.Sorted(maps.Keys(skipped)) {
		if !ran[test] {
			nowhere = append(nowhere, test+": "+skipped[test])
		}
	}
	return nowhere, nil
}

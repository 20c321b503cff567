package need_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/internal/need"
)

func TestATestThatWasSkippedAndRanNowhereIsFound(t *testing.T) {
	const pkg = "example.org/vlan"
	for name, tt := range map[string]struct {
		records string
		want    []string
		err     string
	}{
		"ran on the second machine": {"skipped " + pkg + " TestA: no VLAN\nran " + pkg + " TestB\nran " + pkg + " TestA\n", nil, ""},
		"skipped on both": {"skipped " + pkg + " TestA: no VLAN\nran " + pkg + " TestB\nskipped " + pkg + " TestA: no VLAN\n",
			[]string{pkg + " TestA: no VLAN"}, ""},
		"ran in another package":  {"skipped " + pkg + " TestA: no VLAN\nran example.org/nft TestA\n", []string{pkg + " TestA: no VLAN"}, ""},
		"ran as another subtest":  {"skipped " + pkg + " TestA/x: no\nran " + pkg + " TestA/y\n", []string{pkg + " TestA/x: no"}, ""},
		"nothing was recorded":    {"", nil, "EGRET_NEEDS"},
		"only skips are recorded": {"skipped " + pkg + " TestA: no VLAN\n", nil, "EGRET_NEEDS"},
		"torn":                    {"ran " + pkg + " TestA\nski", nil, "ski"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := need.Nowhere(strings.NewReader(tt.records))
			if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want one that says %q", err, tt.err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// inner names the part of this test that the test runs in a process of its own, to see what it records and whether it
// is skipped.
const inner = "EGRET_NEED_TEST"

func TestNeedsRecordWhetherTheTestRan(t *testing.T) {
	switch os.Getenv(inner) {
	case "there":
		need.KubeProgram(t, "there")
		return
	case "missing":
		need.KubeProgram(t, "there") // is not the test's last need
		need.KubeProgram(t, "missing")
		t.Fatal("went on")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "there"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	const name = "github.com/egret-project/egret/internal/need TestNeedsRecordWhetherTheTestRan"
	for _, tt := range []struct {
		part, ci string
		fails    bool
		want     string // the beginning of the records
	}{
		{"there", "", false, "ran " + name + "\n"},
		{"missing", "", false, "skipped " + name + ": needs missing"},
		{"missing", "1", true, "ran " + name + "\n"}, // it failed, and that is enough
	} {
		t.Run(fmt.Sprintf("%s, EGRET_CI=%s", tt.part, tt.ci), func(t *testing.T) {
			records := filepath.Join(t.TempDir(), "needs")
			c := exec.Command(os.Args[0], "-test.run=^TestNeedsRecordWhetherTheTestRan$")
			c.Env = append(os.Environ(), inner+"="+tt.part, "EGRET_CI="+tt.ci, "EGRET_NEEDS="+records, "EGRET_KUBE_BIN="+dir)
			out, err := c.CombinedOutput()
			if (err != nil) != tt.fails {
				t.Errorf("ended with %v:\n%s", err, out)
			}
			got, err := os.ReadFile(records)
			if err != nil || !strings.HasPrefix(string(got), tt.want) || strings.Count(string(got), "\n") != 1 {
				t.Errorf("recorded %q (%v), want one line that begins with %q", got, err, tt.want)
			}
		})
	}
}

// On any machine each of the kernel's features is either there or recorded as missing, and its name is in the reason.
func TestKernelFeatures(t *testing.T) {
	for name, feature := range map[string]func(testing.TB){"dummy": need.Dummy, "VLAN": need.VLAN, "VXLAN": need.VXLANGBP} {
		t.Run(name, func(t *testing.T) { feature(t) })
	}
}

// Package tools checks that what integration/tools lists is all that the tests and the scripts call.
package tools_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/netns"
)

const script = "../../integration/tools"

// inner says that the test runs in a process of its own, with the folder of links as its PATH.
const inner = "EGRET_TOOLS_TEST"

func TestAProgramThatTheListLacksFailsTheTestByItsName(t *testing.T) {
	need.Root(t)
	calls := func(t *testing.T) {
		netns.Enter(t)
		netns.Run(t, "ip link show lo")
		netns.Run(t, "sysctl -n net.ipv4.ip_forward")
		netns.Run(t, "conntrack -V")
	}
	if os.Getenv(inner) != "" {
		calls(t)
		return
	}
	list, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "path")
	for _, lacks := range []string{"", "conntrack", "sysctl", "ip", ""} { // over the same folder: links come and go
		text := string(list)
		if lacks != "" {
			text = regexp.MustCompile(`(?m)^([a-z0-9-]+:.*) `+lacks+`( .*)?$`).ReplaceAllString(text, "$1$2")
		}
		changed := filepath.Join(t.TempDir(), "tools")
		if err := os.WriteFile(changed, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(changed, path).CombinedOutput(); err != nil {
			t.Fatalf("making the links: %v\n%s", err, out)
		}
		c := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		c.Env = append(os.Environ(), inner+"=1", "PATH="+path, "EGRET_NEEDS=")
		out, err := c.CombinedOutput()
		switch {
		case lacks == "" && err != nil:
			t.Errorf("with the whole list: %v\n%s", err, out)
		case lacks != "" && (err == nil || !strings.Contains(string(out), `"`+lacks+`": executable file not found`)):
			t.Errorf("without %s in the list: %v, want that it fails and names it\n%s", lacks, err, out)
		}
	}
}

// CI is `make test`: there a program that is on every machine, and that nothing of ours calls, must not be found.
func TestInCIWhatIsNotListedIsNotFound(t *testing.T) {
	path, err := exec.LookPath("factor")
	if err == nil && os.Getenv("EGRET_CI") != "" {
		t.Errorf("%s is found, and not listed in %s: PATH is %s, want it to be the folder of links", path, script, os.Getenv("PATH"))
	}
}

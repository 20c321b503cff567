package netns_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/netns"
)

// inner names the part of the test that it runs in a process of its own, to see it fail.
const inner = "EGRET_NETNS_TEST"

// A test that looks whether something is refused must not take a program that is not installed for the refusal, nor for
// a kernel that lacks something.
func TestAProgramThatIsMissingFailsTheTestByItsName(t *testing.T) {
	need.Root(t)
	space := fmt.Sprintf("egret-netns-%d", os.Getppid()) // of the process that is seen to fail
	for name, tt := range map[string]struct {
		program string
		use     func(*testing.T)
	}{
		"that succeeds or not":             {"no-such-program", func(t *testing.T) { netns.OK(t, space, "no-such-program -q") }},
		"that a shell runs":                {"no-such-program", func(t *testing.T) { netns.OK(t, space, "sh -c no-such-program") }},
		"that prints":                      {"no-such-program", func(t *testing.T) { netns.Run(t, "no-such-program -q") }},
		"that asks what the kernel has":    {"ip", func(t *testing.T) { t.Setenv("PATH", "/nowhere"); need.Dummy(t) }},
		"that makes what the kernel lacks": {"ip", func(t *testing.T) { t.Setenv("PATH", "/nowhere"); need.VLAN(t) }},
	} {
		t.Run(name, func(t *testing.T) {
			if os.Getenv(inner) != "" {
				tt.use(t)
				return
			}
			space := fmt.Sprintf("egret-netns-%d", os.Getpid())
			netns.Run(t, "ip netns add "+space)
			defer netns.Run(t, "ip netns del "+space)
			c := exec.Command(os.Args[0], "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v")
			c.Env = append(os.Environ(), inner+"=1", "EGRET_NEEDS=")
			if out, err := c.CombinedOutput(); err == nil || !strings.Contains(string(out), tt.program) || !strings.Contains(string(out), "not found") {
				t.Errorf("ended with %v, want that it fails and says that %s is not found:\n%s", err, tt.program, out)
			}
		})
	}
}

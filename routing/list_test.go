package routing

import (
	"net/netip"
	"strings"
	"testing"
)

// What is observed is told in the words that bring it: each line of the Changes that made it is there, and nothing
// else.
func TestObservedPrintsTheLinesThatMakeIt(t *testing.T) {
	r := open(t)
	if text := observe(t, r).String(); text != "" {
		t.Errorf("without anything: %s", text)
	}
	local := netip.MustParseAddr("10.10.0.101")
	c := reach(t, r, State{Overlay: Overlay{Local: local, MTU: 1450}, Peers: []Peer{{"node-2", netip.MustParseAddr("10.10.0.102")}}})
	text := observe(t, r).String()
	for line := range strings.Lines(c.Entries().String()) {
		for _, verb := range []string{" add ", " replace "} {
			line = strings.Replace(line, verb, " ", 1)
		}
		// a link's settings are on its own line
		if !strings.Contains(text, line) && !strings.HasPrefix(line, "sysctl") && !strings.HasPrefix(line, "ip link set") {
			t.Errorf("%q is not in\n%s", line, text)
		}
	}
	if !strings.Contains(text, "ip link egret.vx type vxlan id 7 dstport 8479") || !strings.Contains(text, "rule pref 1000") {
		t.Errorf("no link, or no rule:\n%s", text)
	}
}

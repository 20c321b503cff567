package conntrack

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// TestDeleteAsksAboutEachEntryAndDeletesWhatMatches has entries of both families and several protocols, one behind a
// Service.
func TestDeleteAsksAboutEachEntryAndDeletesWhatMatches(t *testing.T) {
	netns.Enter(t)
	if err := Delete(func(Connection) bool { return true }); err != nil {
		t.Errorf("an empty table: %v", err)
	}
	for _, entry := range []string{
		"-s 10.0.0.1 -d 192.0.2.1 -p tcp --sport 1000 --dport 80 --state ESTABLISHED -m 5",
		"-s 10.0.0.1 -d 192.0.2.1 -p udp --sport 1000 --dport 53 -m 5",
		"-s 10.0.0.1 -d 192.0.2.2 -p icmp --icmp-type 8 --icmp-code 0 --icmp-id 7 -m 5",
		"-s 10.0.0.2 -d 10.96.0.1 --dst-nat 192.0.2.3 -p tcp --sport 1000 --dport 80 --state ESTABLISHED",
		"-s fd00::1 -d 2001:db8::1 -p tcp --sport 1000 --dport 80 --state ESTABLISHED -m 6",
		"-s fd00::2 -d 2001:db8::1 -p udp --sport 1000 --dport 53 -m 6",
	} {
		netns.Run(t, "conntrack -I -t 600 "+entry)
	}
	var asked []string
	err := Delete(func(c Connection) bool {
		asked = append(asked, fmt.Sprintf("%s > %s mark %d", c.Source, c.Destination, c.Mark))
		return c.Source.String() == "10.0.0.1" && c.Destination.String() == "192.0.2.1" || c.Source.String() == "fd00::1"
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(asked)
	want := []string{
		"10.0.0.1 > 192.0.2.1 mark 5", "10.0.0.1 > 192.0.2.1 mark 5", "10.0.0.1 > 192.0.2.2 mark 5", "10.0.0.2 > 192.0.2.3 mark 0",
		"fd00::1 > 2001:db8::1 mark 6", "fd00::2 > 2001:db8::1 mark 6",
	}
	if diff := cmp.Diff(want, asked); diff != "" {
		t.Errorf("asked about (-want +got):\n%s", diff)
	}
	left := netns.Run(t, "conntrack -L -f ipv4") + netns.Run(t, "conntrack -L -f ipv6")
	for source, want := range map[string]int{"src=10.0.0.1 ": 1, "src=10.0.0.2 ": 1, "src=fd00::1 ": 0, "src=fd00::2 ": 1} {
		if got := strings.Count(left, source); got != want {
			t.Errorf("%s: %d entries are left, want %d", source, got, want)
		}
	}
}

// TestDeleteOfALargeTable has more entries than one answer of the kernel holds.
func TestDeleteOfALargeTable(t *testing.T) {
	netns.Enter(t)
	var lines strings.Builder // of one process: each takes half a second on an emulated machine
	for port := range 400 {
		fmt.Fprintf(&lines, "-I -t 600 -s 10.0.0.1 -d 192.0.2.1 -p udp --sport %d --dport 53 -m %d\n", 1000+port, port%2)
	}
	file := filepath.Join(t.TempDir(), "entries")
	if err := os.WriteFile(file, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	netns.Run(t, "conntrack -R "+file)
	if err := Delete(func(c Connection) bool { return c.Mark == egress.Mark(1) }); err != nil {
		t.Fatal(err)
	}
	if kept, gone := strings.Count(netns.Run(t, "conntrack -L -m 0"), "udp "), strings.Count(netns.Run(t, "conntrack -L -m 1"), "udp "); kept != 200 || gone != 0 {
		t.Errorf("%d of 200 kept, %d of 200 left", kept, gone)
	}
}

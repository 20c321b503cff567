package conntrack

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// connect makes an entry. Further arguments are those of conntrack(8).
func connect(t *testing.T, source, destination string, mark egress.Mark, more string) {
	t.Helper()
	netns.Run(t, fmt.Sprintf("conntrack -I -s %s -d %s -p tcp --sport 1000 --dport 80 --state ESTABLISHED -u SEEN_REPLY,ASSURED -t 600 -m %d %s", source, destination, mark, more))
}

func TestDeleteIsAskedAboutEveryConnectionOfBothFamilies(t *testing.T) {
	netns.Enter(t)
	mark := egress.ID(5).ConnMark()
	connect(t, "10.0.0.1", "10.0.0.2", mark, "")
	connect(t, "10.0.0.3", "10.0.0.2", 0, "--src-nat 192.0.2.9")
	connect(t, "10.0.0.1", "10.96.0.1", 0, "--dst-nat 192.0.2.7") // a Service whose endpoint is outside
	connect(t, "fd00::1", "fd00::2", mark, "")
	a := netip.MustParseAddr
	want := map[Connection]bool{
		{a("10.0.0.1"), a("10.0.0.2"), a("10.0.0.1"), 1000, mark, unix.IPPROTO_TCP, 80, false}: true,
		{a("10.0.0.3"), a("10.0.0.2"), a("192.0.2.9"), 1000, 0, unix.IPPROTO_TCP, 80, false}:   true,
		{a("10.0.0.1"), a("192.0.2.7"), a("10.0.0.1"), 1000, 0, unix.IPPROTO_TCP, 80, false}:   true,
		{a("fd00::1"), a("fd00::2"), a("fd00::1"), 1000, mark, unix.IPPROTO_TCP, 80, false}:    true,
	}
	got := map[Connection]bool{}
	if err := Delete(func(c Connection) bool {
		got[c] = true
		return c.Source == a("10.0.0.1") && c.Mark == 0 || c.Source == a("fd00::1")
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("connections (-want +got):\n%s", diff)
	}
	left := netns.Run(t, "conntrack -L -f ipv4") + netns.Run(t, "conntrack -L -f ipv6")
	if strings.Count(left, "tcp ") != 2 || strings.Contains(left, "10.96.0.1") || strings.Contains(left, "fd00::1") {
		t.Errorf("left are\n%s\nwant those that did not match", left)
	}
}

func TestDeleteOfNothingIsNoError(t *testing.T) {
	netns.Enter(t)
	if err := Delete(func(Connection) bool { return true }); err != nil {
		t.Error(err)
	}
}

func TestMarkedListsTheConnectionsOfAMarkAndSaysWhichHaveEnded(t *testing.T) {
	netns.Enter(t)
	mark := egress.ID(5).ConnMark()
	connect(t, "10.0.0.1", "10.0.0.2", mark, "--src-nat 192.0.2.9")
	connect(t, "10.0.0.3", "10.0.0.2", mark+1, "")
	netns.Run(t, fmt.Sprintf("conntrack -I -s 10.0.0.4 -d 10.0.0.2 -p tcp --sport 1000 --dport 80 --state TIME_WAIT -t 600 -m %d", mark))
	netns.Run(t, fmt.Sprintf("conntrack -I -s fd00::1 -d fd00::2 -p udp --sport 1000 --dport 53 -t 600 -m %d", mark))
	a := netip.MustParseAddr
	want := map[Connection]bool{
		{a("10.0.0.1"), a("10.0.0.2"), a("192.0.2.9"), 1000, mark, unix.IPPROTO_TCP, 80, false}: true,
		{a("10.0.0.4"), a("10.0.0.2"), a("10.0.0.4"), 1000, mark, unix.IPPROTO_TCP, 80, true}:   true,
		{a("fd00::1"), a("fd00::2"), a("fd00::1"), 1000, mark, unix.IPPROTO_UDP, 53, false}:     true,
	}
	list, err := Marked(mark)
	if err != nil {
		t.Fatal(err)
	}
	got := map[Connection]bool{}
	for _, c := range list {
		got[c] = true
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("connections (-want +got):\n%s", diff)
	}
}

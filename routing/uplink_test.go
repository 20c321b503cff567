package routing

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/egret-project/egret/internal/netns"
)

func TestTheUplinkIsNeverALinkOfOurs(t *testing.T) {
	r := open(t)
	ip := netip.MustParseAddr("10.10.0.101")
	if _, err := uplink(t, ip); err == nil || !strings.Contains(err.Error(), "10.10.0.101") {
		t.Errorf("no link carries it: %v", err)
	}
	reach(t, r, parseState(t, sections(t, "testdata/source.txtar")["state"]))
	if l, err := uplink(t, ip); err == nil {
		t.Errorf("only the overlay carries it: got %s", l.Name)
	}
	for _, line := range []string{
		"ip link add dup type bridge", "ip addr add 10.10.0.101/32 dev dup",
		"ip link add uplink mtu 1400 address 02:00:00:00:00:01 type veth peer name other",
		"ip link set uplink up", "ip link set other up",
		"ip addr add 10.10.0.101/24 dev uplink", "ip addr add fd10::101/64 dev uplink nodad",
		"ip link add egret0 type bridge", "ip addr add 10.10.0.8/32 dev egret0",
		"ip addr add 192.0.2.1 peer 192.0.2.2 dev dup",
		// tentative, on a link that is down: nobody knows whether it is ours alone
		"sysctl -qw net.ipv6.conf.dup.accept_dad=1", "ip addr add fd10::77/64 dev dup",
	} {
		netns.Run(t, line)
	}
	l := awaitUplink(t, ip, func(l Link) bool { return l.Up })
	if l.Name != "uplink" || l.MTU != 1400 || l.MAC.String() != "02:00:00:00:00:01" || !l.Up || l.Index == 0 {
		t.Errorf("got %+v", l)
	}
	if !l.HasIPv6() {
		t.Errorf("no IPv6: %+v", l)
	}
	for _, off := range []string{"uplink", "default"} {
		netns.Run(t, "sysctl -qw net.ipv6.conf."+off+".disable_ipv6=1")
		if l := awaitUplink(t, ip, func(Link) bool { return true }); l.HasIPv6() {
			t.Errorf("IPv6 is off (%s): %+v", off, l)
		}
		netns.Run(t, "sysctl -qw net.ipv6.conf."+off+".disable_ipv6=0")
		netns.Run(t, "ip addr replace fd10::101/64 dev uplink nodad")
	}
	all, err := ReadLinks()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for ip, name := range all.Addresses() {
		got[ip.String()] = name
	}
	want := map[string]string{"10.10.0.101": "uplink", "fd10::101": "uplink", "10.10.0.8": "egret0", "192.0.2.1": "dup"}
	delete(got, "10.10.0.101")
	delete(want, "10.10.0.101") // on two links that are not ours: either will do
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	netns.Run(t, "ip link set other down") // no carrier any more
	awaitUplink(t, ip, func(l Link) bool { return !l.Up })
}

// awaitUplink returns the uplink once it is as wanted: the kernel notes some time later that a carrier came or went.
func awaitUplink(t *testing.T, ip netip.Addr, wanted func(Link) bool) Link {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		l, err := uplink(t, ip)
		if err != nil {
			t.Fatal(err)
		}
		if wanted(l) {
			return l
		}
		if time.Now().After(end) {
			t.Fatalf("still %+v", l)
		}
	}
}

func TestAddressesOfTheOverlayAloneAreSaidToBeThere(t *testing.T) {
	r := open(t)
	reach(t, r, parseState(t, sections(t, "testdata/alone.txtar")["state"]))
	links, err := ReadLinks()
	if err != nil {
		t.Fatal(err)
	}
	all := links.Addresses()
	if got := all[netip.MustParseAddr("10.10.0.101")]; got != "egret.vx" || len(all) != 1 {
		t.Errorf("got %v", all)
	}
}

func TestCheckLeavesNothingBehind(t *testing.T) {
	r := open(t)
	netns.Run(t, "ip link add egret.check type vxlan id 16777215 dstport 8479 gbp") // of a check that was killed
	for range 2 {
		if err := Check(); err != nil {
			t.Error(err)
		}
		if got := netns.Run(t, "ip -br link"); strings.Contains(got, "egret") {
			t.Errorf("left behind:\n%s", got)
		}
	}
	reach(t, r, parseState(t, sections(t, "testdata/alone.txtar")["state"]))
	before := netns.Run(t, "ip link")
	if err := Check(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, netns.Run(t, "ip link")); diff != "" {
		t.Errorf("the overlay shows that all is there, and still: %s", diff)
	}
}

func TestAnInterruptedDumpIsNeverTakenForWhole(t *testing.T) {
	calls := 0
	got, err := whole("things", func() (int, error) {
		if calls++; calls < 5 {
			return calls, netlink.ErrDumpInterrupted
		}
		return calls, nil
	})
	if got != 5 || err != nil {
		t.Errorf("got %d, %v, want what the fifth read gave", got, err)
	}
	got, err = whole("things", func() (int, error) { return 1, netlink.ErrDumpInterrupted })
	if got != 0 || !errors.Is(err, netlink.ErrDumpInterrupted) {
		t.Errorf("got %d, %v, want nothing but the error", got, err)
	}
}

// uplink returns the link that carries ip now.
func uplink(t *testing.T, ip netip.Addr) (Link, error) {
	t.Helper()
	links, err := ReadLinks()
	if err != nil {
		t.Fatal(err)
	}
	return links.Uplink(ip)
}

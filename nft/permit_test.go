package nft

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/netns"
)

var (
	ip4 = netip.MustParseAddr("10.10.0.8")
	ip6 = netip.MustParseAddr("fd10::8")
)

// eventually waits until ok, and fails the test when that takes too long.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 10 s: %s", what)
		}
	}
}

func permits(t testing.TB, tables *Tables) map[netip.Addr]time.Duration {
	t.Helper()
	p, err := tables.Permits()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAPermitEndsByItself(t *testing.T) {
	tables := open(t)
	reach(t, tables, State{})
	start := time.Now()
	if err := tables.Permit([]Permit{{IP: ip4, Answer: true}, {IP: ip6, Answer: true}}, 300*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if p := permits(t, tables); time.Since(start) < 200*time.Millisecond && (len(p) != 2 || p[ip4] > 300*time.Millisecond) {
		t.Errorf("permits %v, want two of at most 300 ms", p)
	}
	eventually(t, "the permits are still there", func() bool { return len(permits(t, tables)) == 0 })
	// The kernel counts by ticks, which come late on a busy machine: what is set meanwhile ends earlier, and never later.
	if took := time.Since(start); took < 200*time.Millisecond {
		t.Errorf("they lasted %v, want 300 ms", took)
	}
}

func TestARenewalSetsTheEndAnew(t *testing.T) {
	tables := open(t)
	reach(t, tables, State{})
	for _, d := range []time.Duration{time.Minute, time.Hour, 2 * time.Minute} {
		if err := tables.Permit([]Permit{{IP: ip4, Answer: true}, {IP: ip4}}, d); err != nil {
			t.Fatal(err)
		}
		if got := permits(t, tables)[ip4]; got > d || got < d-30*time.Second {
			t.Errorf("after a renewal for %v the permit lasts %v", d, got)
		}
	}
}

func TestOnlyAnsweringIsRevoked(t *testing.T) {
	tables := open(t)
	reach(t, tables, State{})
	if err := tables.Permit([]Permit{{IP: ip4, Answer: true}, {IP: ip6, Answer: true}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	in := func(set, ip string) bool { return strings.Contains(netns.Run(t, "nft list set "+set), ip+" ") }
	answering := func() int {
		t.Helper()
		ips, err := tables.Answering()
		if err != nil {
			t.Fatal(err)
		}
		return len(ips)
	}
	if !in("arp egret permit4", "10.10.0.8") || !in("inet egret answer6", "fd10::8") || answering() != 2 {
		t.Errorf("no permit to answer; %d are said", answering())
	}
	absent := netip.MustParseAddr("10.10.0.99")
	if err := tables.RevokeAnswer(ip4, absent, ip6, ip4); err != nil {
		t.Fatal(err)
	}
	if in("arp egret permit4", "10.10.0.8") || in("inet egret answer6", "fd10::8") || answering() != 0 {
		t.Error("the permit to answer is still there")
	}
	// A relay's renewal gives nothing back.
	if err := tables.Permit([]Permit{{IP: ip4}, {IP: ip6}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	if in("arp egret permit4", "10.10.0.8") || len(permits(t, tables)) != 2 {
		t.Errorf("permits %v, and ARP %s", permits(t, tables), netns.Run(t, "nft list set arp egret permit4"))
	}
	if err := tables.Revoke(ip4, absent, ip6); err != nil {
		t.Fatal(err)
	}
	if p := permits(t, tables); len(p) != 0 {
		t.Errorf("permits %v after Revoke", p)
	}
}

func TestAPermitForNoTimeIsARevocation(t *testing.T) {
	tables := open(t)
	reach(t, tables, State{})
	for _, d := range []time.Duration{0, -time.Second, time.Microsecond} {
		if err := tables.Permit([]Permit{{IP: ip4, Answer: true}}, time.Hour); err != nil {
			t.Fatal(err)
		}
		if err := tables.Permit([]Permit{{IP: ip4, Answer: true}}, d); err != nil {
			t.Fatal(err)
		}
		if listed := netns.Run(t, "nft list ruleset"); strings.Contains(listed, "10.10.0.8") {
			t.Errorf("Permit for %v left one:\n%s", d, listed)
		}
	}
}

func TestWithoutTablesThereAreNoPermits(t *testing.T) {
	tables := openShared(t)
	check := func() {
		t.Helper()
		if err := tables.Permit([]Permit{{IP: ip4, Answer: true}}, time.Second); !errors.Is(err, ErrNoTable) {
			t.Errorf("Permit: %v, want ErrNoTable", err)
		}
		if err := errors.Join(tables.Revoke(ip4, ip6), tables.RevokeAnswer(ip4)); err != nil {
			t.Errorf("Revoke: %v", err)
		}
	}
	check()
	if p := permits(t, tables); len(p) != 0 {
		t.Errorf("permits %v", p)
	}
	if n, err := tables.Counters(); err != nil || len(n) != 0 {
		t.Errorf("counters %v, %v", n, err)
	}
	reach(t, tables, State{})
	if err := tables.Permit([]Permit{{IP: ip4, Answer: true}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	// With one table gone, nothing is renewed by halves, and what is left can be revoked.
	netns.Run(t, "nft delete table arp egret")
	check()
	if p := permits(t, tables); len(p) != 0 {
		t.Errorf("permits %v after Revoke", p)
	}
	if err := errors.Join(tables.Delete(), tables.Delete()); err != nil {
		t.Errorf("Delete: %v", err)
	}
	if got := netns.Run(t, "nft list ruleset"); got != "" {
		t.Errorf("left behind:\n%s", got)
	}
}

// Hundreds of new elements make the kernel resize the set while it is read.
func TestNoPermitIsMissedWhileTheKernelResizesTheSet(t *testing.T) {
	tables := open(t)
	var list []Permit
	for ip := ip4; len(list) < 1200; ip = ip.Next() {
		list = append(list, Permit{IP: ip, Answer: true})
	}
	for range 40 {
		if err := tables.Delete(); err != nil {
			t.Fatal(err)
		}
		reach(t, tables, State{})
		if err := tables.Permit(list, time.Hour); err != nil {
			t.Fatal(err)
		}
		if n := len(permits(t, tables)); n != len(list) {
			t.Fatalf("%d permits, want %d", n, len(list))
		}
	}
}

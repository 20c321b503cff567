package announce

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/internal/netns"
)

func TestAnAddressIsDefendedMoreAndMoreSeldom(t *testing.T) {
	var logged bytes.Buffer
	var changed atomic.Int32
	a := New(Config{Permitted: always, Log: slog.New(slog.NewTextHandler(&logged, nil)), Changed: func() { changed.Add(1) }})
	ip, foreign := netip.MustParseAddr("10.0.0.1"), net.HardwareAddr{2, 0, 0, 0, 0, 9}
	want := map[netip.Addr]Conflict{ip: {"eth0", "02:00:00:00:00:09"}}
	got := record(t, a, func() {
		a.Set(set("10.0.0.1", "eth0"))
		time.Sleep(100 * time.Millisecond)
		a.saw("eth0", ip, foreign) // a frame of the former owner
		time.Sleep(10 * time.Second)
		if c := a.Conflicts(); len(c) > 0 {
			t.Errorf("conflicts %v", c)
		}
		a.saw("eth1", ip, foreign)
		a.saw("eth0", netip.MustParseAddr("10.0.0.2"), foreign)
		for range 900 { // every tenth of a second
			a.saw("eth0", ip, foreign)
			time.Sleep(100 * time.Millisecond)
		}
		if diff := cmp.Diff(want, a.Conflicts()); diff != "" || changed.Load() != 1 {
			t.Errorf("told %d times, conflicts (-want +got):\n%s", changed.Load(), diff)
		}
		time.Sleep(6 * time.Minute)
		if c := a.Conflicts(); len(c) > 0 || changed.Load() != 2 {
			t.Errorf("told %d times, conflicts %v", changed.Load(), c)
		}
	}, never)
	// Four when it is new; against the other after 0, 10, 30 and 70 s; then as usual.
	if diff := cmp.Diff(`0s 10.0.0.1 eth0
1.1s 10.0.0.1 eth0
2.2s 10.0.0.1 eth0
4.4s 10.0.0.1 eth0
10.1s 10.0.0.1 eth0
20.1s 10.0.0.1 eth0
40.1s 10.0.0.1 eth0
1m20.1s 10.0.0.1 eth0
6m20.1s 10.0.0.1 eth0
`, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if n := strings.Count(logged.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings:\n%s", n, &logged)
	}
}

// A host with a thousand MAC addresses costs no more than one that has one.
func TestAHostThatChangesItsMACAddressIsToldOfAsOftenAsTheAddressIsDefended(t *testing.T) {
	var changed atomic.Int32
	a := New(Config{Permitted: always, Changed: func() { changed.Add(1) }})
	ip := netip.MustParseAddr("10.0.0.1")
	record(t, a, func() {
		a.Set(set("10.0.0.1", "eth0"))
		time.Sleep(10 * time.Second)
		for i := range 1000 { // in 100 s
			a.saw("eth0", ip, net.HardwareAddr{2, 0, 0, 0, byte(i >> 8), byte(i)})
			time.Sleep(100 * time.Millisecond)
		}
	}, never)
	if n := changed.Load(); n != 4 { // after 0, 10, 30 and 70 s
		t.Errorf("told %d times in 100 s, want 4", n)
	}
	if c := a.Conflicts()[ip]; c.MAC == "02:00:00:00:00:00" {
		t.Error("the first MAC address is told for good")
	}
}

// both returns the addresses of the other host of neighbor on a link, and one of each family that nobody has.
func both(link string) map[netip.Addr]string {
	return set("10.0.0.200", link, "10.0.0.7", link, "fd10::200", link, "fd10::7", link)
}

func TestProbeFindsWhoHasAnAddress(t *testing.T) {
	netns.Enter(t)
	there := neighbor(t)
	out, err := there("cat /sys/class/net/eth0/address")
	if err != nil {
		t.Fatal(err)
	}
	holder := Conflict{"eth0", strings.TrimSpace(out)}
	want := map[netip.Addr]Conflict{netip.MustParseAddr("10.0.0.200"): holder, netip.MustParseAddr("fd10::200"): holder}
	start := time.Now()
	got, err := Probe(t.Context(), both("eth0"), 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if took := time.Since(start); took > 5*time.Second { // under emulation, seconds
		t.Errorf("it took %v, want 150 ms", took)
	}
	if out, err := there("ip neigh show 10.0.0.7"); err != nil || out != "" {
		t.Errorf("the neighbour learned an address from the probe: %v %s", err, out)
	}
	if _, err := Probe(t.Context(), both("eth9"), time.Millisecond); err == nil || !strings.Contains(err.Error(), "eth9") {
		t.Errorf("a link that is not there: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if _, err := Probe(ctx, both("eth0"), 50*time.Millisecond); err == nil {
		t.Error("no error after the end of the context")
	}
}

// A host that begins to use an address while it is here is found by what it says, and the address is announced against
// it.
func TestAHostThatTakesAnAddressLaterIsReported(t *testing.T) {
	netns.Enter(t)
	there := neighbor(t)
	holder := Conflict{"eth0", "02:00:00:00:00:99"}
	changed := make(chan struct{}, 10)
	a := New(Config{Permitted: always, Changed: func() { changed <- struct{}{} }})
	a.Set(set("10.0.0.8", "eth0", "fd10::8", "eth0"))
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		defer stop()
		time.Sleep(settled + 3*time.Second) // Run may be slow to begin
		for _, line := range []string{"ip addr add 10.0.0.8/24 dev eth0", "ip addr add fd10::8/64 dev eth0 nodad",
			// which it tells by NDP
			"sysctl -qw net.ipv6.conf.eth0.ndisc_notify=1", "ip link set eth0 address 02:00:00:00:00:99",
			"arping -q -A -c1 -I eth0 10.0.0.8"} {
			if out, err := there(line); err != nil {
				t.Errorf("%s: %v\n%s", line, err, out)
			}
		}
		for range 2 {
			select {
			case <-changed:
			case <-time.After(10 * time.Second):
				t.Errorf("after 10 s: conflicts %v", a.Conflicts())
				return
			}
		}
		want := map[netip.Addr]Conflict{netip.MustParseAddr("10.0.0.8"): holder, netip.MustParseAddr("fd10::8"): holder}
		if diff := cmp.Diff(want, a.Conflicts()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}()
	if err := a.Run(ctx); err != nil {
		t.Error(err)
	}
}

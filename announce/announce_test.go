package announce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var always = func(netip.Addr) bool { return true }

// record runs a for as long as script takes, in a bubble, and returns what a would have sent, and when.
func record(t *testing.T, a *Announcer, script func(), fail func(link string) error, macs ...func(link string) string) string {
	t.Helper()
	var b strings.Builder
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		a.wake = make(chan struct{}, 1) // of the bubble
		a.listen = func(context.Context) (func(list4, list6 map[netip.Addr]string), func()) {
			return func(_, _ map[netip.Addr]string) {}, func() {} // a bubble's time stands still while a socket is read
		}
		a.sender = func() (func(link string, ip netip.Addr, permitted func(netip.Addr) bool) error, func()) {
			return func(link string, ip netip.Addr, permitted func(netip.Addr) bool) error {
				if !permitted(ip) {
					return nil
				}
				fmt.Fprintf(&b, "%v %s %s\n", time.Since(start), ip, link)
				return fail(link)
			}, func() {}
		}
		a.macOf = func(string) string { return "" }
		for _, f := range macs {
			a.macOf = f
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.Run(ctx) }()
		script()
		stop()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return b.String()
}

func never(string) error { return nil }

func set(pairs ...string) map[netip.Addr]string {
	m := map[netip.Addr]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[netip.MustParseAddr(pairs[i])] = pairs[i+1]
	}
	return m
}

func TestANewAddressIsAnnouncedSeveralTimesAndThenNowAndThen(t *testing.T) {
	a := New(Config{Permitted: always})
	got := record(t, a, func() {
		a.Set(set("10.0.0.1", "eth0"))
		time.Sleep(3 * time.Second)
		a.Set(set("10.0.0.1", "eth0", "10.0.0.2", "eth1")) // says nothing new of the first
		time.Sleep(11 * time.Minute)
	}, never)
	want := `0s 10.0.0.1 eth0
1.1s 10.0.0.1 eth0
2.2s 10.0.0.1 eth0
3s 10.0.0.2 eth1
4.1s 10.0.0.2 eth1
4.4s 10.0.0.1 eth0
5.2s 10.0.0.2 eth1
7.4s 10.0.0.2 eth1
5m4.4s 10.0.0.1 eth0
5m7.4s 10.0.0.2 eth1
10m4.4s 10.0.0.1 eth0
10m7.4s 10.0.0.2 eth1
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestAnotherLinkOrAWithdrawalBeginsAnew(t *testing.T) {
	a := New(Config{Permitted: always})
	got := record(t, a, func() {
		a.Set(set("10.0.0.1", "eth0", "10.0.0.2", "eth0"))
		time.Sleep(time.Second)
		a.Set(set("10.0.0.1", "eth1"))
		time.Sleep(2 * time.Second)
		a.Set(nil)
		a.Set(set("10.0.0.1", "eth1")) // before Run had a chance to see that it was gone
		time.Sleep(time.Second)
		a.Set(nil)
		time.Sleep(time.Hour)
	}, never)
	want := `0s 10.0.0.1 eth0
0s 10.0.0.2 eth0
1s 10.0.0.1 eth1
2.1s 10.0.0.1 eth1
3s 10.0.0.1 eth1
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestALinkWithAnotherMACAddressIsAnnouncedAnew(t *testing.T) {
	a := New(Config{Permitted: always})
	var mac atomic.Pointer[string]
	is := func(text string) { mac.Store(&text) }
	is("02:00:00:00:00:01")
	of := func(link string) string {
		if link == "eth0" {
			return *mac.Load()
		}
		return "02:00:00:00:00:09"
	}
	got := record(t, a, func() {
		want := set("10.0.0.1", "eth0", "10.0.0.2", "eth1")
		a.Set(want)
		time.Sleep(10 * time.Second)
		a.Set(want) // as each pass does
		time.Sleep(time.Second)
		for _, next := range []string{"", "02:00:00:00:00:02"} { // it is away for a moment
			is(next)
			a.Set(want)
			time.Sleep(time.Second)
		}
		time.Sleep(10 * time.Second)
	}, never, of)
	if diff := cmp.Diff(`0s 10.0.0.1 eth0
0s 10.0.0.2 eth1
1.1s 10.0.0.1 eth0
1.1s 10.0.0.2 eth1
2.2s 10.0.0.1 eth0
2.2s 10.0.0.2 eth1
4.4s 10.0.0.1 eth0
4.4s 10.0.0.2 eth1
12s 10.0.0.1 eth0
13.1s 10.0.0.1 eth0
14.2s 10.0.0.1 eth0
16.4s 10.0.0.1 eth0
`, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestWithoutAPermitThereIsNoFrame(t *testing.T) {
	var permitted atomic.Bool
	permitted.Store(true)
	a := New(Config{Permitted: func(netip.Addr) bool { return permitted.Load() }})
	got := record(t, a, func() {
		a.Set(set("10.0.0.1", "eth0"))
		time.Sleep(time.Second)
		permitted.Store(false)
		time.Sleep(time.Second)
		permitted.Store(true)
		time.Sleep(time.Second)
	}, never)
	if want := "0s 10.0.0.1 eth0\n2.2s 10.0.0.1 eth0\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestNothingIsSentForWhatWasWithdrawnMeanwhile(t *testing.T) {
	a := New(Config{Permitted: always})
	got := record(t, a, func() {
		a.Set(set("10.0.0.1", "eth0", "10.0.0.2", "eth0", "10.0.0.3", "eth0"))
		time.Sleep(time.Second)
	}, func(string) error {
		a.Set(set("10.0.0.1", "eth0", "10.0.0.3", "eth0"))
		return nil
	})
	if want := "0s 10.0.0.1 eth0\n0s 10.0.0.3 eth0\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestAFailureIsRetriedLoggedOnceAndDelaysNoOther(t *testing.T) {
	var logged bytes.Buffer
	a := New(Config{Permitted: always, Log: slog.New(slog.NewTextHandler(&logged, nil))})
	var broken atomic.Bool
	broken.Store(true)
	got := record(t, a, func() {
		a.Set(set("10.0.0.1", "eth0", "10.0.0.2", "eth1"))
		time.Sleep(3 * time.Second)
		broken.Store(false)
		time.Sleep(3 * time.Second)
	}, func(link string) error {
		if broken.Load() && link == "eth0" {
			return errors.New("network is down")
		}
		return nil
	})
	want := `0s 10.0.0.1 eth0
0s 10.0.0.2 eth1
1.1s 10.0.0.1 eth0
1.1s 10.0.0.2 eth1
2.2s 10.0.0.1 eth0
2.2s 10.0.0.2 eth1
3.3s 10.0.0.1 eth0
4.4s 10.0.0.1 eth0
4.4s 10.0.0.2 eth1
5.5s 10.0.0.1 eth0
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if n := strings.Count(logged.String(), "level=WARN"); n != 1 || !strings.Contains(logged.String(), "egress_ip=10.0.0.1 iface=eth0") {
		t.Errorf("%d warnings:\n%s", n, logged.String())
	}
}

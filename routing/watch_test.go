package routing

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// watch runs Watch in the namespace of the calling goroutine until the test ends; what it returns gets a value for each
// change.
func watch(t *testing.T) <-chan struct{} {
	t.Helper()
	ns, changes, done := netns.Current(t), make(chan struct{}, 1000), make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- new(Watcher).Watch(ctx, func() { changes <- struct{}{} })
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
	await(t, changes, "the first call")
	return changes
}

func await(t *testing.T, changes <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-changes:
	case <-time.After(10 * time.Second):
		t.Fatalf("not told of: %s", what)
	}
}

// quiet takes what is still to come of an event that was awaited, as a link's several messages.
func quiet(changes <-chan struct{}) {
	for {
		select {
		case <-changes:
		case <-time.After(50 * time.Millisecond):
			return
		}
	}
}

func TestWatchReportsWhatOthersDoToOurs(t *testing.T) {
	r := open(t)
	netns.Run(t, "ip link add uplink type veth peer name other")
	reach(t, r, parseState(t, sections(t, "testdata/blocks.txtar")["state"]))
	changes := watch(t)
	for _, line := range []string{
		"ip rule del pref 1200",
		"ip -6 rule del pref 1999",
		"ip route flush table 15189",
		"ip -6 route flush table 15190",
		"ip neigh del 192.0.0.2 dev egret.vx",
		"bridge fdb del 02:e9:ae:f4:27:9f dev egret.vx dst 10.10.0.103",
		"ip addr add 10.10.0.8/24 dev uplink",
		"ip addr add fd10::8/64 dev uplink nodad",
		"ip link set uplink up",
		"ip link add egret0 type bridge",
		"ip link del egret.vx",
		"ip link add egret.vx type vxlan id 7 dstport 8479 local 10.10.0.101",
		"ip neigh add 10.10.0.105 lladdr 02:00:00:00:00:05 dev egret.vx nud permanent", // of the new link
	} {
		quiet(changes)
		netns.Run(t, line)
		await(t, changes, line)
	}
}

func TestWatchIsSilentAboutTheRoutesOfOthers(t *testing.T) {
	r := open(t)
	netns.Run(t, "ip link add uplink type veth peer name other")
	netns.Run(t, "ip link set uplink up")
	netns.Run(t, "ip link set other up")
	netns.Run(t, "ip addr add 10.10.0.101/24 dev uplink")
	reach(t, r, parseState(t, sections(t, "testdata/blocks.txtar")["state"]))
	changes := watch(t)
	quiet(changes)
	batch(t, "ip", slices.Repeat([]string{"route add 192.0.2.0/24 via 10.10.0.1", "route del 192.0.2.0/24"}, 100)...)
	netns.Run(t, "ip rule add pref 1300 fwmark 0x2000/0x3fff lookup 7000")
	netns.Run(t, "ip neigh add 10.10.0.9 lladdr 02:00:00:00:00:09 dev uplink nud permanent")
	netns.Run(t, "ip rule del pref 1200")
	await(t, changes, "our rule") // events come in order
	if n := len(changes); n > 0 {
		t.Errorf("%d calls too many", n)
	}
}

func TestWatchTakesLostEventsForAChange(t *testing.T) {
	r := open(t)
	release := make(chan struct{})
	calls := 0
	ns, done := netns.Current(t), make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	lost := make(chan struct{}, 1)
	var w Watcher
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- w.Watch(ctx, func() {
			if calls++; calls == 1 {
				<-release // so that the socket's buffer overflows
				return
			}
			select {
			case lost <- struct{}{}:
			default:
			}
		})
	}()
	// Routes of others, so that only the loss can make Watch call. Each message takes a kilobyte or so of the buffer's
	// 200.
	for i := range 2000 {
		f := families[0]
		route := routeVia(f, 100, f.any, f.any.Addr())
		route.Gw, route.Flags, route.LinkIndex, route.Protocol, route.Priority = nil, 0, 1, 95, i+1
		if err := r.handle.RouteAdd(&route); err != nil {
			t.Fatal(err)
		}
	}
	before := w.Now()
	close(release)
	await(t, lost, "the loss")
	if before.events == w.Now().events {
		t.Error("what was read before the loss still holds")
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("Watch: %v", err)
	}
}

// Once it has dropped events the kernel drops all that follow, without another word, until those that wait are read. A
// process that stands still meanwhile, for however long, misses none.
func TestWhatIsDroppedWhileLostEventsAreReadIsAChange(t *testing.T) {
	r := open(t)
	reach(t, r, parseState(t, sections(t, "testdata/blocks.txtar")["state"]))
	var w Watcher
	listens, release, known := make(chan struct{}), make(chan struct{}), make(chan Moment, 1)
	calls := 0
	ns, done := netns.Current(t), make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- w.Watch(ctx, func() {
			switch calls++; calls {
			case 1:
				close(listens)
				<-release // so that the socket's buffer overflows
			case 2: // the loss is known, and all is read anew
				known <- w.Now()
				<-release
			}
		})
	}()
	<-listens
	// Routes of others: of these alone nothing is to be read.
	var others []string
	for i := range 2000 {
		others = append(others, fmt.Sprintf("route add 192.0.2.0/24 dev lo table 100 metric %d", i+1))
	}
	netns.Run(t, "ip link set lo up")
	batch(t, "ip", others...)
	release <- struct{}{}
	read := <-known
	netns.Run(t, "ip rule del pref 1200") // of ours, and dropped
	time.Sleep(1100 * time.Millisecond)   // the process stands still
	release <- struct{}{}
	for deadline := time.Now().Add(10 * time.Second); w.Now().events == read.events; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a rule of ours was deleted while events were lost, and what was read before holds")
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("Watch: %v", err)
	}
}

func TestWhatWasReadHoldsUntilAnEventAndNotRightAfterOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w Watcher
		holds := func(when string, m Moment, want bool) {
			t.Helper()
			if w.Holds(m) != want {
				t.Errorf("%s: what was read holds: %t, want %t", when, !want, want)
			}
		}
		before := w.Now()
		holds("nobody watches", before, false)
		w.note(true)
		holds("read before Watch listened", before, false)
		early := w.Now()
		holds("read right after an event", early, false)
		if left := time.Until(w.Due(early)); left != settle {
			t.Errorf("to be read again in %v, want %v", left, settle)
		}
		time.Sleep(settle)
		holds("read right after an event, and later on", early, false)
		m := w.Now()
		holds("at rest", m, true)
		time.Sleep(time.Minute)
		if left := time.Until(w.Due(m)); left != wholeEvery-time.Minute {
			t.Errorf("at rest it is to be read again in %v, want %v after it was read", left, wholeEvery)
		}
		time.Sleep(wholeEvery - time.Minute - time.Millisecond)
		holds("minutes later", m, true)
		time.Sleep(time.Millisecond)
		holds("too many minutes later", m, false)
		m = w.Now()
		w.note(true)
		holds("after an event", m, false)
		time.Sleep(settle)
		m = w.Now()
		w.note(false)
		holds("after Watch has ended", m, false)
		time.Sleep(settle)
		holds("while nobody watches", w.Now(), false)
	})
}

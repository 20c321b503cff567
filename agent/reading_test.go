package agent

import (
	"fmt"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// watched has the kernel of the node watched until the test ends.
func (n *node) watched() {
	n.t.Helper()
	ns, ctx, done := netns.Current(n.t), n.t.Context(), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- n.kernel.read.watcher.Watch(ctx, n.wake)
	}()
	n.t.Cleanup(func() {
		if err := <-done; err != nil {
			n.t.Errorf("Watch: %v", err)
		}
	})
}

func (n *node) reads() []int {
	r := &n.kernel.read
	return []int{r.all.reads, r.links.reads, r.routes.reads}
}

// rests makes passes until what was read of the kernel holds.
func (n *node) rests() {
	n.t.Helper()
	n.until("nothing more to read", false, func() bool {
		k := &n.kernel.read
		return n.announced != nil && time.Until(k.due()) > time.Second && k.routes.known && k.watcher.Holds(k.routes.at) && k.watcher.Holds(k.links.at) && k.watcher.Holds(k.all.at)
	})
}

// selected returns what the tables have for the pods of the node.
func (n *node) selected() string { return netns.Run(n.t, "nft list map inet egret pod4") }

// A pass for a pod's event costs what the pod changes.
func TestAPodsEventDoesNotHaveLinksAndRoutesReadAnew(t *testing.T) {
	n := newNode(t)
	n.watched()
	n.members("e0", "node-1", "10.244.1.2")
	n.rests()
	before := n.reads()
	for i := range 10 {
		pod := fmt.Sprintf("10.244.1.%d", 10+i)
		n.members("e0", "node-1", pod)
		n.until(pod+" is selected", false, func() bool { return strings.Contains(n.selected(), pod+" ") })
	}
	if got := n.reads(); !slices.Equal(got, before) {
		t.Errorf("links, addresses and routes were read %v times before 10 events of pods, and %v times after", before, got)
	}
}

// What others do to ours is mended at once, whether the kernel tells of it or not.
func TestWhatOthersDoIsReadAndMended(t *testing.T) {
	n := newNode(t)
	n.watched()
	n.members("e0", "node-1", "10.244.1.2")
	n.rests()
	n.takeOver(false) // of IPs that have addresses and routes
	locals := strconv.Itoa(egress.AddressTable)
	for _, tt := range []struct{ do, look, want string }{
		{"ip rule del pref 1999", "ip rule", "1999:"},
		{"ip -6 rule del pref 1999", "ip -6 rule", "1999:"},
		{"ip route flush table 15189", "ip route show table 15189", "192.0.2.11 via"},
		{"ip route flush table " + locals, "ip route show table " + locals, "local 192.0.2.11"},
		{"ip neigh del 192.0.0.2 dev egret.vx", "ip neigh show dev egret.vx", "192.0.0.2"},
		{"ip addr del 192.0.2.11/32 dev egret0", "ip addr show dev egret0", "192.0.2.11/32"},
		{"ip link set egret.vx down", "ip link show dev egret.vx", "UP"},
		{"ip link del egret.vx", "ip neigh show dev egret.vx", "192.0.0.2"},
		{"ip link del egret0", "ip addr show dev egret0", "192.0.2.11/32"},
	} {
		n.rests()
		if had := netns.Run(t, tt.look); !strings.Contains(had, tt.want) {
			t.Errorf("before %q: %q does not show %q: %s", tt.do, tt.look, tt.want, had)
			continue
		}
		netns.Run(t, tt.do)
		n.until(tt.do+" is mended", false, func() bool {
			if strings.Contains(tt.do, "link del") && !linkThere(tt.do) {
				return false
			}
			return strings.Contains(netns.Run(t, tt.look), tt.want)
		})
	}
	// The kernel tells of the route that took the place of ours, and not that ours is gone.
	n.rests()
	netns.Run(t, "ip route replace 192.0.2.11 via 192.0.0.9 dev egret.vx onlink proto static table 15189")
	for deadline := time.Now().Add(20 * time.Second); ; {
		if _, err := n.reconcile(t.Context()); err != nil && strings.Contains(err.Error(), "another program's route is in its place") {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("a route of others in the place of one of ours is not told: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	netns.Run(t, "ip route del 192.0.2.11 proto static table 15189")
	n.until("it is back", false, func() bool {
		return strings.Contains(netns.Run(t, "ip route show table 15189"), "192.0.2.11 via 192.0.0.2")
	})
	// Of this the kernel tells nothing: the next pass sees it.
	n.rests()
	const setting = "net/ipv4/conf/egret.vx/accept_local"
	netns.Run(t, "sysctl -q -w "+setting+"=0")
	n.until(setting+" is mended", false, func() bool { return strings.TrimSpace(netns.Run(t, "sysctl -n "+setting)) == "1" })
}

// linkThere reports whether there is a link of the name that a command ends with.
func linkThere(do string) bool {
	f := strings.Fields(do)
	_, err := net.InterfaceByName(f[len(f)-1])
	return err == nil
}

// The kernel tells that an address goes before it takes away what goes with it: what is read in between is not held for
// what there is.
func TestWhatIsReadRightAfterAnEventIsReadOnceMore(t *testing.T) {
	n := newNode(t)
	n.watched()
	n.rests()
	netns.Run(t, "ip link add foreign type bridge")
	n.until("the event has come", false, func() bool { return time.Until(n.kernel.read.due()) < time.Second })
	before := n.reads()
	n.rests()
	if got := n.reads(); got[0] <= before[0] || got[1] <= before[1] || got[2] <= before[2] {
		t.Errorf("links, addresses and routes were read %v times right after an event, and %v times when no other had come", before, got)
	}
	if next, err := n.reconcile(t.Context()); err != nil || time.Until(n.kernel.read.due()) < time.Minute {
		t.Errorf("at rest a pass is due at %v, error %v", time.Until(next), err)
	}
}

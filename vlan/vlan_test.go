package vlan

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/tools/txtar"

	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/internal/tour"
)

var (
	update = flag.Bool("update", false, "write the goldens of testdata anew")
	seed   = flag.Int64("seed", 0, "seed of the random orders; 0: the time")
)

// open returns Links of a new namespace, which the calling goroutine is in from then on.
func open(t *testing.T) *Links {
	t.Helper()
	netns.Enter(t)
	l, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func observe(t *testing.T, l *Links) Observed {
	t.Helper()
	o, err := l.Observe()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// reach makes the kernel equal to want, makes the same changes once more, checks that nothing is left to do, and
// returns the changes.
func reach(t *testing.T, l *Links, want State) Changes {
	t.Helper()
	c := Diff(observe(t, l), want)
	for _, part := range []Changes{c.Removes(), c.Adds(), c} {
		if err := l.Apply(part); err != nil {
			t.Fatalf("applying\n%s%v", part, err)
		}
	}
	if left := Diff(observe(t, l), want); !left.Empty() {
		t.Fatalf("still to do:\n%s", left)
	}
	return c
}

func sections(t *testing.T, file string) (state State, m map[string]string) {
	t.Helper()
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m = map[string]string{}
	for _, f := range a.Files {
		m[f.Name] = string(f.Data)
	}
	d := json.NewDecoder(strings.NewReader(m["state"]))
	d.DisallowUnknownFields()
	if err := d.Decode(&state); err != nil {
		t.Fatalf("%s: state: %v", file, err)
	}
	return state, m
}

// varying is what differs between two links that are the same to us: MAC address, index, and what goes with the kind.
var varying = regexp.MustCompile(`(?m)^\d+: | +link/ether .*\n| qdisc \w+|,MULTICAST|,NOARP|\s+$`)

// carrier is what the kernel may find out up to a second after a link is up.
var carrier = regexp.MustCompile(`NO-CARRIER,| state \w+`)

// listing is what the real ip prints of egret0.
func listing(t *testing.T) string {
	t.Helper()
	return varying.ReplaceAllString(netns.Run(t, "ip addr show dev egret0"), "") + "\n"
}

func TestGoldens(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d goldens: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			l := open(t)
			golden, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			want, s := sections(t, file)
			c := reach(t, l, want)
			if pure := Diff(Observed{}, want); pure.String() != c.String() {
				t.Errorf("an empty namespace is not the zero Observed (-zero +empty):\n%s", cmp.Diff(pure.String(), c.String()))
			}
			got := txtar.Format(&txtar.Archive{Comment: txtar.Parse(golden).Comment, Files: []txtar.File{
				{Name: "state", Data: []byte(s["state"])}, {Name: "lines", Data: []byte(c.String())}, {Name: "listing", Data: []byte(listing(t))},
			}})
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(golden), string(got)); diff != "" {
				t.Errorf("differs from golden; -update rewrites it (-want +got):\n%s", diff)
			}
		})
	}
}

// TestWalk reaches the state of every golden from that of every other, in random order.
func TestWalk(t *testing.T) {
	if *seed == 0 {
		*seed = time.Now().UnixNano()
	}
	t.Logf("-seed=%d", *seed)
	random := rand.New(rand.NewPCG(uint64(*seed), 0))
	files, _ := filepath.Glob("testdata/*.txtar")
	l := open(t)
	from := "nothing"
	for _, i := range tour.New(random, len(files)) {
		state, s := sections(t, files[i])
		c := reach(t, l, state)
		// The kernel lists addresses in the order in which they came.
		if diff := cmp.Diff(slices.Sorted(strings.Lines(s["listing"])), slices.Sorted(strings.Lines(listing(t)))); diff != "" {
			t.Fatalf("%s after %s:\n%s(-want +got):\n%s", files[i], from, c, diff)
		}
		from = files[i]
	}
}

func TestWhatIsDamagedComesBack(t *testing.T) {
	want, s := sections(t, "testdata/dual.txtar")
	for name, lines := range map[string]string{
		"address deleted":      "ip addr del 10.10.0.8/32 dev egret0",
		"IPv6 address deleted": "ip addr del fd10::8/128 dev egret0",
		"address too many":     "ip addr add 10.10.0.9/32 dev egret0; ip addr add fd10::10/128 dev egret0",
		"address of a subnet":  "ip addr del 10.10.0.8/32 dev egret0; ip addr add 10.10.0.8/24 dev egret0",
		"all deleted":          "ip addr flush dev egret0",
		"address that ends":    "ip addr change 10.10.0.8/32 dev egret0 valid_lft 100 preferred_lft 100",
		"address preferred":    "ip -6 addr change fd10::8/128 dev egret0 preferred_lft forever",
		"link up":              "ip link set egret0 up",
		"link up and down":     "ip link set egret0 up; ip link set egret0 down",
		"link deleted":         "ip link del egret0",
	} {
		t.Run(name, func(t *testing.T) {
			l := open(t)
			reach(t, l, want)
			for line := range strings.SplitSeq(lines, "; ") {
				netns.Run(t, line)
			}
			c := reach(t, l, want)
			if c.Empty() {
				t.Error("not seen")
			}
			got := listing(t)
			if diff := cmp.Diff(slices.Sorted(strings.Lines(s["listing"])), slices.Sorted(strings.Lines(got))); diff != "" {
				t.Errorf("after\n%s(-want +got):\n%s", c, diff)
			}
		})
	}
}

func TestAddressesElsewhereStay(t *testing.T) {
	l := open(t)
	for _, line := range []string{
		"ip link add uplink type veth peer name other",
		// no addresses that come by themselves
		"ip link set uplink addrgenmode none", "ip link set other addrgenmode none",
		"ip link set uplink up", "ip link set other up",
		"ip addr add 10.10.0.8/24 dev uplink", "ip addr add 10.10.0.9/32 dev lo", "ip addr add fd10::8/64 dev uplink nodad",
		"ip link add egret1 type bridge", "ip addr add 10.10.0.7/32 dev egret1",
	} {
		netns.Run(t, line)
	}
	before := netns.Run(t, "ip -d -o addr")
	for _, name := range []string{"dual", "two", "none"} {
		want, _ := sections(t, "testdata/"+name+".txtar")
		reach(t, l, want)
	}
	if err := l.Delete(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, netns.Run(t, "ip -d -o addr")); diff != "" {
		t.Errorf("(-before +after):\n%s", diff)
	}
	if err := l.Delete(); err != nil {
		t.Errorf("nothing left to delete: %v", err)
	}
}

func TestALinkOfOthersByOurNameIsReportedAndKept(t *testing.T) {
	for kind, lines := range map[string]string{
		"a link of type veth":       "ip link add egret0 type veth peer name other",
		"a bridge with the port p0": "ip link add egret0 type bridge; ip link add p0 type veth peer name p1; ip link set p0 master egret0",
	} {
		t.Run(kind, func(t *testing.T) {
			l := open(t)
			for line := range strings.SplitSeq(lines+"; ip addr add 10.10.0.9/32 dev egret0; ip link set egret0 up", "; ") {
				netns.Run(t, line)
			}
			everything := func() string {
				return carrier.ReplaceAllString(netns.Run(t, "ip -o addr")+netns.Run(t, "ip -o link"), "")
			}
			before := everything()
			want, _ := sections(t, "testdata/dual.txtar")
			for _, err := range []error{l.Apply(Diff(observe(t, l), want)), l.Delete()} {
				if !errors.Is(err, errForeign) || !strings.Contains(err.Error(), kind) {
					t.Errorf("got %v, want an error that says it is %s", err, kind)
				}
			}
			if diff := cmp.Diff(before, everything()); diff != "" {
				t.Errorf("(-before +after):\n%s", diff)
			}
		})
	}
}

// TestAddressesOnALinkThatIsDownAreServed is the reason why egret0 may be down: a neighbour on another link gets an
// answer to its ARP request, and to its packets of both families.
func TestAddressesOnALinkThatIsDownAreServed(t *testing.T) {
	for _, kind := range []string{"dummy", "bridge"} {
		t.Run(kind, func(t *testing.T) {
			if kind == "dummy" {
				need.Dummy(t)
			}
			netns.Enter(t)
			neighbour := netns.Current(t)
			l := open(t)
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "egret0"
			var dev netlink.Link = &netlink.Bridge{LinkAttrs: attrs}
			if kind == "dummy" {
				dev = &netlink.Dummy{LinkAttrs: attrs}
			}
			if err := netlink.LinkAdd(dev); err != nil {
				t.Fatal(err)
			}
			want, _ := sections(t, "testdata/dual.txtar")
			reach(t, l, want)
			attrs.Name = "eth0"
			err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(neighbour)})
			if err != nil {
				t.Fatal(err)
			}
			node := netns.Current(t)
			macs := map[int]string{}
			for n, ns := range []int{node, neighbour} {
				netns.Switch(t, ns)
				netns.Run(t, "ip link set eth0 up")
				netns.Run(t, fmt.Sprintf("ip addr add 10.10.0.%d/24 dev eth0", 101+n))
				netns.Run(t, fmt.Sprintf("ip addr add fd10::%d/64 dev eth0 nodad", 101+n))
				eth0, err := netlink.LinkByName("eth0")
				if err != nil {
					t.Fatal(err)
				}
				macs[ns] = eth0.Attrs().HardwareAddr.String()
			}
			// Neighbour discovery for an address on another link needs a responder, which is not what this is about.
			netns.Run(t, "ip neigh replace fd10::8 lladdr "+macs[node]+" dev eth0")
			netns.Switch(t, node)
			netns.Run(t, "ip neigh replace fd10::102 lladdr "+macs[neighbour]+" dev eth0")
			netns.Switch(t, neighbour)
			if got := netns.Run(t, "arping -f -w 10 -I eth0 10.10.0.8"); !strings.Contains(strings.ToLower(got), macs[node]) {
				t.Errorf("not answered by %s:\n%s", macs[node], got)
			}
			for _, ip := range []string{"10.10.0.8", "fd10::8"} {
				netns.Run(t, "ping -q -c 1 -w 10 "+ip)
			}
		})
	}
}

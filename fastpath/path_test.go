package fastpath

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/netns"
)

func TestTheObjectIsOfItsSource(t *testing.T) {
	for file, want := range map[string]string{"fast.c": sourceHash, "fast.o": objectHash} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != want {
			t.Errorf("%s has changed since the object was made: run `go generate ./fastpath`, which needs clang and libbpf's headers", file)
		}
	}
}

var (
	egressIP = netip.MustParseAddr("10.0.0.9")
	self     = netip.MustParseAddr("10.1.0.1")
	other    = netip.MustParseAddr("10.1.0.2")
)

// state is that of a gateway between two links.
func state(overlay, uplink int) State {
	return State{
		Self: self, Overlay: overlay, Uplink: uplink, MTU: 1450, Nodes: []netip.Addr{other, other},
		Ports: []Port{{egress.Block{IP: egressIP, First: 2048, Size: 128}, other}},
	}
}

func TestDiffTakesAwayBeforeItGives(t *testing.T) {
	have := Observed{contents: state(5, 6).contents()}
	for _, tt := range []struct {
		name          string
		want          func(*State)
		removes, adds string
	}{
		{"nothing changes", func(*State) {}, "", ""},
		{"an IPv6 node and block are left out", func(s *State) {
			s.Nodes = append(s.Nodes, netip.MustParseAddr("fd00::2"))
			s.Ports = append(s.Ports, Port{egress.Block{IP: netip.MustParseAddr("fd00::9"), First: 2048, Size: 64}, other})
		}, "", ""},
		{"a block goes", func(s *State) { s.Ports[0].Size = 64 }, "fast path units delete 10.0.0.9:2112", ""},
		{"a block is another node's", func(s *State) { s.Ports[0].Size, s.Ports[0].Node = 64, netip.MustParseAddr("10.1.0.3") },
			"fast path units delete 10.0.0.9:2048, fast path units delete 10.0.0.9:2112", "fast path units add 10.0.0.9:2048"},
		{"the IP goes", func(s *State) { s.Ports = nil },
			"fast path units delete 10.0.0.9:2048, fast path units delete 10.0.0.9:2112, fast path counts delete 10.0.0.9", ""},
		{"the uplink is another", func(s *State) { s.Uplink = 7 },
			"fast path detach from_overlay link 5, fast path detach from_uplink link 6, fast path detach to_overlay link 5, fast path configure",
			"fast path attach from_overlay link 5, fast path attach from_uplink link 7, fast path attach to_overlay link 5"},
		{"the node's address is IPv6", func(s *State) { s.Self = netip.MustParseAddr("fd00::1") },
			"fast path detach from_overlay link 5, fast path detach from_uplink link 6, fast path detach to_overlay link 5, fast path configure, " +
				"fast path units delete 10.0.0.9:2048, fast path units delete 10.0.0.9:2112, fast path peers delete " + egress.OverlayMAC(other).String() +
				", fast path counts delete 10.0.0.9", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := state(5, 6)
			tt.want(&want)
			c := Diff(have, want)
			removes := lines(c.Removes())
			if removes != tt.removes {
				t.Errorf("removes %q, want %q", removes, tt.removes)
			}
			if adds := strings.TrimPrefix(strings.TrimPrefix(lines(c), removes), ", "); adds != tt.adds {
				t.Errorf("adds %q, want %q", adds, tt.adds)
			}
		})
	}
}

func lines(c Changes) string {
	return strings.ReplaceAll(strings.TrimSuffix(c.String(), "\n"), "\n", ", ")
}

// links makes two links in a namespace of the test's own, and returns their indexes.
func links(t *testing.T) (overlay, uplink int) {
	t.Helper()
	need.TCX(t)
	netns.Enter(t)
	netns.Run(t, "ip link add overlay type veth peer name uplink")
	return index(t, "overlay"), index(t, "uplink")
}

func index(t *testing.T, name string) int {
	t.Helper()
	l, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Index
}

// attached is how many programs there are at a link.
func attached(t *testing.T, index int) (n int) {
	t.Helper()
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		r, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: at})
		if err != nil {
			t.Fatal(err)
		}
		n += len(r.Programs)
	}
	return n
}

func load(t *testing.T) *Path {
	t.Helper()
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// reach makes a Path what is wanted, and returns what that took.
func reach(t *testing.T, p *Path, want State) string {
	t.Helper()
	observe := func() Observed {
		have, err := p.Observe()
		if err != nil {
			t.Fatal(err)
		}
		return have
	}
	c := Diff(observe(), want)
	if err := p.Apply(c); err != nil {
		t.Fatal(err)
	}
	if left := Diff(observe(), want); !left.Empty() {
		t.Fatalf("left to do:\n%s", left)
	}
	return lines(c)
}

func TestWhatIsAppliedIsThereUntilItIsClosed(t *testing.T) {
	overlay, uplink := links(t)
	p := load(t)
	reach(t, p, state(overlay, uplink))
	if n, m := attached(t, overlay), attached(t, uplink); n != 2 || m != 1 {
		t.Errorf("%d programs at the overlay link and %d at the uplink, want 2 and 1", n, m)
	}
	if got := reach(t, p, state(overlay, uplink)); got != "" {
		t.Errorf("a second time: %s", got)
	}
	reach(t, p, State{})
	if n := attached(t, overlay) + attached(t, uplink); n != 0 {
		t.Errorf("%d programs are left of the zero State", n)
	}
	reach(t, p, state(overlay, uplink))

	// What is to be encrypted must not pass by. (Kernels without IPsec have no policies.)
	add := strings.Fields("ip xfrm policy add src 10.1.0.1 dst 10.1.0.2 dir out tmpl proto esp mode transport")
	if exec.Command(add[0], add[1:]...).Run() == nil {
		t.Log("beside an IPsec policy")
		reach(t, p, state(overlay, uplink))
		if n := attached(t, overlay) + attached(t, uplink); n != 0 {
			t.Errorf("%d programs beside an IPsec policy", n)
		}
		netns.Run(t, "ip xfrm policy flush")
		reach(t, p, state(overlay, uplink))
	}

	// Somebody deletes the links and makes others.
	netns.Run(t, "ip link del overlay")
	netns.Run(t, "ip link add overlay type veth peer name uplink")
	overlay, uplink = index(t, "overlay"), index(t, "uplink")
	reach(t, p, state(overlay, uplink))
	if n, m := attached(t, overlay), attached(t, uplink); n != 2 || m != 1 {
		t.Errorf("%d programs at the new overlay link and %d at the new uplink, want 2 and 1", n, m)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if n := attached(t, overlay) + attached(t, uplink); n != 0 {
		t.Errorf("%d programs are left after Close", n)
	}
}

func TestAPolicyOfIPsecIsTold(t *testing.T) {
	links(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	told := 0
	err := load(t).Watch(ctx, func() { // in the namespace, as Watch is
		switch told++; told {
		case 1: // it listens
			add := strings.Fields("ip xfrm policy add src 10.1.0.1 dst 10.1.0.2 dir out tmpl proto esp mode transport")
			if exec.Command(add[0], add[1:]...).Run() != nil {
				t.Log("this kernel has no IPsec")
				told = 3
				cancel()
			}
		case 2:
			netns.Run(t, "ip xfrm policy flush")
		case 3:
			cancel()
		}
	})
	if err != nil || told < 3 {
		t.Errorf("told %d times, want once that it listens, once of a policy and once that it is gone (%v)", told, err)
	}
}

// What cannot be removed must not be there beside tables that do not have it any more.
func TestWithoutARemovalNoProgramStays(t *testing.T) {
	overlay, uplink := links(t)
	p := load(t)
	want := state(overlay, uplink)
	reach(t, p, want)
	if err := p.coll.Maps["units"].Freeze(); err != nil { // from now on, nobody writes to it
		t.Fatal(err)
	}
	have, err := p.Observe()
	if err != nil {
		t.Fatal(err)
	}
	want.Ports = nil
	want.Nodes = append(want.Nodes, netip.MustParseAddr("10.1.0.3"))
	if err := p.Apply(Diff(have, want)); err == nil || !strings.Contains(err.Error(), "units delete 10.0.0.9:2048") {
		t.Errorf("%v, want what could not be removed", err)
	}
	if n := attached(t, overlay) + attached(t, uplink); n != 0 {
		t.Errorf("%d programs have ports that they are not to have", n)
	}
	if have, err = p.Observe(); err != nil || len(have.peers) != 1 {
		t.Errorf("peers %v (%v), want none added", have.peers, err)
	}
}

// A program that is detached by hand is attached again, and those of others at the link stay where they are.
func TestProgramsOfOthersAtTheLinkStay(t *testing.T) {
	overlay, uplink := links(t)
	p, others := load(t), load(t)
	foreign, err := link.AttachTCX(link.TCXOptions{Interface: uplink, Program: others.coll.Programs["from_uplink"], Attach: ebpf.AttachTCXIngress})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	reach(t, p, state(overlay, uplink))
	if n := attached(t, uplink); n != 2 {
		t.Errorf("%d programs at the uplink, want that of others and ours", n)
	}
	if err := p.links[attachment{"from_uplink", uplink}].Detach(); err != nil {
		t.Fatal(err)
	}
	if got, want := reach(t, p, state(overlay, uplink)), fmt.Sprintf("fast path attach from_uplink link %d", uplink); got != want {
		t.Errorf("detached by hand: %q, want %q", got, want)
	}
	reach(t, p, State{})
	if n := attached(t, uplink); n != 1 {
		t.Errorf("%d programs at the uplink without ours, want that of others", n)
	}
}

// deadlines returns the permits that the programs have, as how long they last.
func deadlines(t *testing.T, p *Path) map[netip.Addr]time.Duration {
	t.Helper()
	out, err := p.Permits()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPermitsAreThoseThatWereWrittenLast(t *testing.T) {
	need.TCX(t)
	p := load(t)
	second, six := egressIP.Next(), netip.MustParseAddr("fd00::9")
	permit := func(until time.Time, ips ...netip.Addr) {
		t.Helper()
		if err := p.Permit(ips, until); err != nil {
			t.Fatal(err)
		}
	}
	end := time.Now().Add(time.Hour)
	permit(end, egressIP, second, six)
	got := deadlines(t, p)
	if len(got) != 2 {
		t.Errorf("permits %v, want two", got)
	}
	for ip, left := range got {
		if left > time.Until(end)+time.Second || left < time.Until(end)-time.Minute {
			t.Errorf("%s lasts %v, want %v", ip, left, time.Until(end))
		}
	}
	permit(end, second)
	if got := deadlines(t, p); len(got) != 1 || got[second] == 0 {
		t.Errorf("permits %v, want that of %s", got, second)
	}
	if err := p.Revoke(second, egressIP, six); err != nil {
		t.Fatal(err)
	}
	if got := deadlines(t, p); len(got) != 0 {
		t.Errorf("permits %v after they were revoked", got)
	}
	permit(end, second)
	permit(time.Now(), second)
	if got := deadlines(t, p); len(got) != 0 {
		t.Errorf("permits %v, want none that is over", got)
	}
}

func TestTheCapabilitiesThatTheErrorNamesAreEnough(t *testing.T) {
	overlay, uplink := links(t)
	netns.Keep(t, unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON)
	p := load(t)
	reach(t, p, state(overlay, uplink))
	if err := p.Permit([]netip.Addr{egressIP}, time.Now().Add(time.Hour)); err != nil {
		t.Error(err)
	}
	if _, err := p.Traffic(); err != nil {
		t.Error(err)
	}
}

func TestWithoutCapabilitiesTheErrorSaysWhatIsNeeded(t *testing.T) {
	need.TCX(t)
	netns.Enter(t)
	netns.Keep(t, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
	p, err := New()
	if err == nil {
		p.Close()
		t.Fatal("there is a fast path without CAP_BPF")
	}
	if !errors.Is(err, ErrKernel) || !strings.Contains(err.Error(), "CAP_BPF") {
		t.Errorf("%v, want one that names what is missing", err)
	}
}

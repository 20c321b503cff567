package nft

import (
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

func renewalOf(t testing.TB, tables *Tables, permit, lease time.Duration) Renewal {
	t.Helper()
	r := NewRenewal(permit, lease)
	reach(t, tables, State{Renewal: r})
	return r
}

func constant(d time.Duration) func() (time.Duration, error) {
	return func() (time.Duration, error) { return d, nil }
}

func TestARenewalLengthensAndShortensWithoutACommit(t *testing.T) {
	tables := open(t)
	r := renewalOf(t, tables, 10*time.Second, 50*time.Second)
	list := []Permit{{IP: ip4, Answer: true}, {IP: ip6, Answer: true}}
	if err := tables.Permit(list, time.Second); err != nil {
		t.Fatal(err)
	}
	before, err := tables.read.generation()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ left, want time.Duration }{
		{49 * time.Second, 46870 * time.Millisecond}, {2 * time.Second, 1870 * time.Millisecond}, {10 * time.Second, 10 * time.Second},
	} {
		now := time.Now()
		ends, err := tables.Renew(r, list, constant(tt.left))
		if err != nil {
			t.Fatal(err)
		}
		if d := ends.Sub(now); d > tt.want+r.Window || d < tt.want-r.Window-2*tick {
			t.Errorf("renewed for %v: ends after %v, want %v", tt.left, d, tt.want)
		}
		for ip, left := range permits(t, tables) {
			if left > tt.want || left < tt.want-time.Second {
				t.Errorf("renewed for %v: the permit for %s lasts %v, want %v", tt.left, ip, left, tt.want)
			}
		}
	}
	if after, err := tables.read.generation(); err != nil || after != before {
		t.Errorf("generation %d, %v; it was %d", after, err, before)
	}
}

func TestARenewalThatComesTooLateDoesNothing(t *testing.T) {
	tables := open(t)
	r := renewalOf(t, tables, 2*time.Second, 10*time.Second)
	list := []Permit{{IP: ip4, Answer: true}, {IP: ip6, Answer: true}}
	if err := tables.Permit(list, time.Second); err != nil {
		t.Fatal(err)
	}
	// Frozen between the look at the clock and the frame.
	_, err := tables.Renew(r, list, func() (time.Duration, error) {
		<-time.After(r.Window + 2*tick)
		return 10 * time.Second, nil
	})
	if !errors.Is(err, errNotRenewed) {
		t.Errorf("Renew: %v, want %v", err, errNotRenewed)
	}
	for ip, left := range permits(t, tables) {
		if left > time.Second {
			t.Errorf("the permit for %s was renewed: it lasts %v", ip, left)
		}
	}
}

// Whoever can send any frame on another link than lo, or on the lo of another namespace, renews nothing: a neighbour,
// or a pod with NET_RAW.
func TestFramesOfANeighbourRenewNothing(t *testing.T) {
	tables := open(t)
	ext := outside(t)
	r := renewalOf(t, tables, 2*time.Second, 10*time.Second)
	if err := tables.Permit([]Permit{{IP: ip4, Answer: true}, {IP: ip6, Answer: true}}, time.Second); err != nil {
		t.Fatal(err)
	}
	ext.do(func() error {
		f, err := openFrames()
		if err != nil {
			return err
		}
		defer f.close()
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		for _, m := range []egress.Mark{renewalMark(0, r.Window, 7), renewalMark(renews, 10*time.Second, 7)} {
			for ether, packet := range packets {
				if err := f.send(ether, m); err != nil {
					return err
				}
				to := &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16([]byte(ether)), Ifindex: eth0.Index}
				frame := slices.Concat([]byte{255, 255, 255, 255, 255, 255}, eth0.HardwareAddr, []byte(ether), packet)
				if err := unix.Sendto(int(f), frame, 0, to); err != nil {
					return err
				}
			}
		}
		return nil
	})
	for _, table := range []string{"inet", "arp", "netdev"} {
		if got := netns.Run(t, "nft list set "+table+" egret ticket"); strings.Contains(got, "elements") {
			t.Errorf("a ticket for a neighbour: %s", got)
		}
	}
	for ip, left := range permits(t, tables) {
		if left > time.Second {
			t.Errorf("the permit for %s was renewed: it lasts %v", ip, left)
		}
	}
}

// Other programs mark packets, too, with all kinds of numbers, and what they send on lo is theirs.
func TestPacketsOfOthersWithTheMarkOfARenewalArrive(t *testing.T) {
	tables := open(t)
	netns.Run(t, "ip link set lo up")
	r := renewalOf(t, tables, time.Second, 10*time.Second)
	for _, host := range []string{"127.0.0.1", "::1"} {
		s, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		c, err := net.Dial("udp", s.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var failed error
		if err := raw.Control(func(fd uintptr) {
			failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(renewalMark(renews, r.Lengths[0], 1)))
		}); err != nil || failed != nil {
			t.Fatal(err, failed)
		}
		c.Write([]byte("?")) // what is lost shows as nothing that arrives
		s.SetReadDeadline(time.Now().Add(time.Second))
		if _, _, err := s.ReadFrom(make([]byte, 10)); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
}

package gossip

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/port"
)

// longest is what a connection to such a transport may bring, bytes.
const longest = 1 << 16

// listening returns a transport at an address of the loopback, until the test ends.
func listening(t *testing.T, at netip.AddrPort) *transport {
	t.Helper()
	tr, err := listen(at, func() int { return longest }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

// within returns what comes.
func within[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(limit):
		t.Fatalf("%s did not come within %v", what, limit)
		panic("unreachable")
	}
}

func TestPacketsAndConnectionsComeAsTheyWereSent(t *testing.T) {
	for _, ip := range []string{"127.0.0.10", "::1"} {
		t.Run(ip, func(t *testing.T) {
			a, b := listening(t, netip.AddrPortFrom(netip.MustParseAddr(ip), uint16(port.Hold(t)))), listening(t, netip.AddrPortFrom(netip.MustParseAddr(ip), uint16(port.Hold(t))))
			to := b.packets.LocalAddr().String()
			first, second := bytes.Repeat([]byte("first "), 200), []byte("second")
			for _, packet := range [][]byte{nil, first, second} { // one without content is no packet
				if _, err := a.WriteTo(packet, to); err != nil {
					t.Fatal(err)
				}
			}
			p, q := within(t, "a packet", b.PacketCh()), within(t, "a packet", b.PacketCh())
			if !bytes.Equal(p.Buf, first) || !bytes.Equal(q.Buf, second) { // the first is kept while the second comes
				t.Errorf("got %q and %q", p.Buf, q.Buf)
			}
			if from := a.packets.LocalAddr().String(); p.From.String() != from {
				t.Errorf("from %v, want %v", p.From, from)
			}
			c, err := a.DialTimeout(to, limit)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = c.Write(second); err == nil {
				err = c.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(within(t, "a connection", b.StreamCh()))
			if err != nil || !bytes.Equal(got, second) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// A member gets 20 packets a second and more, all its life.
func TestAPacketCostsLittleMoreMemoryThanItHas(t *testing.T) {
	a := listening(t, netip.AddrPortFrom(addr(0), uint16(port.Hold(t))))
	to := a.packets.LocalAddr().String()
	const packets, most = 500, 1024
	message := make([]byte, 100)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range packets {
		if _, err := a.WriteTo(message, to); err != nil {
			t.Fatal(err)
		}
		within(t, "a packet", a.PacketCh())
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / packets; each > most {
		t.Errorf("%d bytes a packet of %d, want %d at most", each, len(message), most)
	} else {
		t.Logf("%d bytes a packet of %d", each, len(message))
	}
}

// What nobody takes any more does not hold up the end of an agent.
func TestShutdownWaitsForNobody(t *testing.T) {
	at := netip.AddrPortFrom(addr(0), uint16(port.Hold(t)))
	a := listening(t, at)
	to := a.packets.LocalAddr().String()
	for range 3 {
		if _, err := a.WriteTo([]byte("packet"), to); err != nil {
			t.Fatal(err)
		}
		c, err := a.DialTimeout(to, limit)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	done := make(chan error)
	go func() { done <- a.Shutdown() }()
	if err := within(t, "the end", done); err != nil {
		t.Error(err)
	}
	if _, err := a.WriteTo([]byte("packet"), to); err == nil {
		t.Error("a packet was sent after the end")
	}
	for _, network := range []string{"tcp", "udp"} { // the next agent of the node begins at once
		var c io.Closer
		var err error
		if network == "tcp" {
			c, err = net.Listen(network, at.String())
		} else {
			c, err = net.ListenPacket(network, at.String())
		}
		if err != nil {
			t.Error(err)
			continue
		}
		c.Close()
	}
}

func TestAPortThatIsTakenIsSaid(t *testing.T) {
	at := netip.AddrPortFrom(addr(0), uint16(port.Hold(t)))
	listening(t, at)
	if tr, err := listen(at, func() int { return longest }, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("taken twice", tr.Shutdown())
	}
	taken, err := net.ListenPacket("udp", netip.AddrPortFrom(addr(1), at.Port()).String())
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if tr, err := listen(netip.AddrPortFrom(addr(1), at.Port()), func() int { return longest }, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("taken twice", tr.Shutdown())
	}
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr(1), at.Port()).String()) // the port of TCP was given back
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// Whoever reaches the port, as pods do, has no key, but the library reads 20 MB of him before it knows.
func TestWhoOpensManyConnectionsOrSendsMuchIsCut(t *testing.T) {
	tr := listening(t, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.10"), uint16(port.Hold(t))))
	dial := func(from string) net.Conn {
		t.Helper()
		c, err := (&net.Dialer{Timeout: limit, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", tr.streams.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	member := dial("127.0.0.11")
	theirs := within(t, "a member's connection", tr.StreamCh())
	var pod []net.Conn
	for range maxStreams + 10 {
		pod = append(pod, dial("127.0.0.12"))
		within(t, "a connection", tr.StreamCh())
	}
	for i, c := range pod[:11] {
		if err := c.SetReadDeadline(time.Now().Add(limit)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("connection %d of a client with %d: %v, want its end", i, len(pod), err)
		}
	}
	if _, err := member.Write([]byte("here")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(theirs, make([]byte, 4)); err != nil {
		t.Errorf("the connection of another: %v", err)
	}
	go func() { _, _ = member.Write(make([]byte, 2*longest)) }() // ends with the connection
	if n, err := io.Copy(io.Discard, theirs); n != longest-4 || !errors.Is(err, errTooLong) {
		t.Errorf("%d bytes more are read (%v), want %d", n, err, longest-4)
	}
	if err := theirs.Close(); err != nil {
		t.Error(err)
	}
}

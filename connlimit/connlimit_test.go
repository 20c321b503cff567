package connlimit

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// limit is how long something may take on a busy machine.
const limit = 20 * time.Second

// served is a Listener, and its clients.
type served struct {
	t *testing.T
	*Listener
}

func newServed(t *testing.T, may func(from net.Addr) bool) served {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := New(inner, 3, may)
	t.Cleanup(func() { _ = l.Close() })
	return served{t, l}
}

func (s served) dial(from string) (client net.Conn) {
	s.t.Helper()
	c, err := (&net.Dialer{Timeout: limit, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", s.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() }) // the server may have
	return c
}

func (s served) accept(from string) (client, server net.Conn) {
	s.t.Helper()
	client = s.dial(from)
	server, err := s.Accept()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = server.Close() }) // it may be closed
	return client, server
}

func (s served) ends(c net.Conn, within time.Duration) bool {
	s.t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		s.t.Fatal(err)
	}
	_, err := c.Read(make([]byte, 1))
	if err != io.EOF && !errors.Is(err, os.ErrDeadlineExceeded) {
		s.t.Fatal(err)
	}
	return err == io.EOF
}

func TestWhoHasMostConnectionsLosesTheOldest(t *testing.T) {
	stranger := "127.0.0.9"
	s := newServed(t, func(from net.Addr) bool { return from.(*net.TCPAddr).IP.String() != stranger })
	first, _ := s.accept("127.0.0.2")
	second, _ := s.accept("127.0.0.3")
	third, theirs := s.accept("127.0.0.3")
	if err := theirs.Close(); err != nil { // makes room
		t.Fatal(err)
	}
	if !s.ends(third, limit) {
		t.Error("a connection that the server closed does not end")
	}
	fourth, _ := s.accept("127.0.0.3")
	unread := s.dial(stranger)
	fifth, _ := s.accept("127.0.0.3")
	if !s.ends(unread, limit) {
		t.Error("a connection of an address that is not allowed does not end")
	}
	if !s.ends(second, limit) {
		t.Error("the oldest connection of who has most is open")
	}
	for i, c := range []net.Conn{first, fourth, fifth} {
		if s.ends(c, 50*time.Millisecond) {
			t.Errorf("connection %d of those that stay was closed", i)
		}
	}
}

// An attempt: a pod connects again and again with the address of its node, which a viewer behind a proxy there has,
// too.
func TestAKeptConnectionStaysHoweverManyComeFromItsAddress(t *testing.T) {
	s := newServed(t, nil)
	keep := func() net.Conn {
		client, server := s.accept("127.0.0.2")
		Keep(Context(t.Context(), server))
		return client
	}
	viewer := keep()
	var others []net.Conn
	for range 10 {
		c, _ := s.accept("127.0.0.2")
		others = append(others, c)
	}
	for i, c := range others[:len(others)-3] {
		if !s.ends(c, limit) {
			t.Errorf("connection %d of those that are not kept is open", i)
		}
	}
	for i, c := range append(others[len(others)-3:], viewer) {
		if s.ends(c, 50*time.Millisecond) {
			t.Errorf("connection %d of those that stay was closed", i)
		}
	}
	for range 3 {
		keep()
	}
	if !s.ends(viewer, limit) {
		t.Error("there are more kept connections than there may be")
	}
}

func TestAClientIsAnAddressOrA64(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"10.0.0.1", "10.0.0.1", true},
		{"10.0.0.1", "::ffff:10.0.0.1", true},
		{"10.0.0.1", "10.0.0.2", false},
		{"2001:db8::1", "2001:db8::ffff:1", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
	} {
		a, b := Client(netip.MustParseAddr(tt.a)), Client(netip.MustParseAddr(tt.b))
		if !a.IsValid() || (a == b) != tt.same {
			t.Errorf("%s is %v, and %s is %v: the same client: %v, want %v", tt.a, a, tt.b, b, a == b, tt.same)
		}
	}
}

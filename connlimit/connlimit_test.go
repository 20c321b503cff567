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

func TestWhoHasMostConnectionsLosesTheOldest(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	stranger := "127.0.0.9"
	l := New(inner, 3, func(from net.Addr) bool { return from.(*net.TCPAddr).IP.String() != stranger })
	t.Cleanup(func() { _ = l.Close() })
	dial := func(from string) (client net.Conn) {
		t.Helper()
		c, err := (&net.Dialer{Timeout: limit, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() }) // the server may have
		return c
	}
	accept := func(from string) (client, server net.Conn) {
		t.Helper()
		client = dial(from)
		if server, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Close() }) // it may be closed
		return client, server
	}
	ends := func(c net.Conn, within time.Duration) bool {
		t.Helper()
		if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		_, err := c.Read(make([]byte, 1))
		if err != io.EOF && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return err == io.EOF
	}
	first, _ := accept("127.0.0.2")
	second, _ := accept("127.0.0.3")
	third, theirs := accept("127.0.0.3")
	if err := theirs.Close(); err != nil { // makes room
		t.Fatal(err)
	}
	if !ends(third, limit) {
		t.Error("a connection that the server closed does not end")
	}
	fourth, _ := accept("127.0.0.3")
	unread := dial(stranger)
	fifth, _ := accept("127.0.0.3")
	if !ends(unread, limit) {
		t.Error("a connection of an address that is not allowed does not end")
	}
	if !ends(second, limit) {
		t.Error("the oldest connection of who has most is open")
	}
	for i, c := range []net.Conn{first, fourth, fifth} {
		if ends(c, 50*time.Millisecond) {
			t.Errorf("connection %d of those that stay was closed", i)
		}
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

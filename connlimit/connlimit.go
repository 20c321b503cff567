// Package connlimit bounds how many connections of a listener are open, for servers whose clients are not known before
// they have spoken: whoever keeps many open takes them from himself.
package connlimit

import (
	"net"
	"net/netip"
	"slices"
	"sync"
)

// Listener accepts connections, of which so many may be open. Where there are more, the client that has most of them
// loses its oldest. It closes connections from addresses that are not allowed, unread.
type Listener struct {
	net.Listener
	most int
	may  func(from net.Addr) bool
	mu   sync.Mutex // guards open
	open []*conn    // the oldest first
}

// New returns a listener that has most connections of l open. may says which addresses are allowed; nil allows all.
func New(l net.Listener, most int, may func(from net.Addr) bool) *Listener {
	return &Listener{Listener: l, most: most, may: may}
}

type conn struct {
	net.Conn
	of   *Listener
	from netip.Prefix
}

// Client is whose an address is where what clients may take is bounded: of IPv6 a host can have all of a /64. Of the
// zero Addr it is the zero Prefix.
func Client(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap()
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	who, _ := ip.Prefix(bits) // fails for more bits than there are
	return who
}

// Accept returns the next connection that may be.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.may != nil && !l.may(c.RemoteAddr()) {
			_ = c.Close() // nothing was written to it
			continue
		}
		return l.add(c), nil
	}
}

func (l *Listener) add(c net.Conn) *conn {
	out := &conn{Conn: c, of: l}
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok { // those of a unix socket are all one client's
		out.from = Client(tcp.AddrPort().Addr())
	}
	l.mu.Lock()
	l.open = append(l.open, out)
	var over *conn
	if len(l.open) > l.most {
		i := Crowding(l.open, func(c *conn) netip.Prefix { return c.from })
		over = l.open[i]
		l.open = slices.Delete(l.open, i, i+1)
	}
	l.mu.Unlock()
	if over != nil {
		_ = over.Conn.Close() // its client has more than others
	}
	return out
}

// Crowding returns which of some connections, the oldest first, is closed where they are too many: the first of the
// client that has most of them. from says whose one is.
func Crowding[T any](open []T, from func(T) netip.Prefix) (first int) {
	has := map[netip.Prefix]int{}
	for _, c := range open {
		has[from(c)]++
	}
	for i, c := range open {
		if has[from(c)] > has[from(open[first])] {
			first = i
		}
	}
	return first
}

func (c *conn) Close() error {
	c.of.mu.Lock()
	c.of.open = slices.DeleteFunc(c.of.open, func(o *conn) bool { return o == c })
	c.of.mu.Unlock()
	return c.Conn.Close()
}

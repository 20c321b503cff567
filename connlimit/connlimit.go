// Package connlimit bounds how many connections of a listener are open, for servers whose clients are not known before
// they have spoken: whoever keeps many open takes them from himself.
package connlimit

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
)

// Listener accepts connections, of which so many may be open, and as many again that are kept (Keep). Where there are
// more of a kind, the client that has most of these loses its oldest. It closes connections from addresses that are not
// allowed, unread.
type Listener struct {
	net.Listener
	most int
	may  func(from net.Addr) bool
	mu   sync.Mutex // guards open
	open []*conn    // the oldest first
}

// New returns a listener that has most connections of l open, and most that are kept. may says which addresses are
// allowed; nil allows all.
func New(l net.Listener, most int, may func(from net.Addr) bool) *Listener {
	return &Listener{Listener: l, most: most, may: may}
}

type conn struct {
	net.Conn
	of   *Listener
	from netip.Prefix
	kept bool // guarded by mu of the Listener
}

type connKey struct{}

// Context is the ConnContext of an http.Server on a Listener, also where TLS is between: Keep finds the connection by
// it.
func Context(ctx context.Context, c net.Conn) context.Context {
	if over, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = over.NetConn()
	}
	return context.WithValue(ctx, connKey{}, c)
}

// Keep says that a request is of somebody who is known: its connection stays open whatever connects that is not, also
// from its own address. Without Context it does nothing.
func Keep(ctx context.Context) {
	c, ok := ctx.Value(connKey{}).(*conn)
	if !ok {
		return
	}
	c.of.mu.Lock()
	c.kept = true
	over := c.of.over(c)
	c.of.mu.Unlock()
	over.end()
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
	over := l.over(out)
	l.mu.Unlock()
	over.end()
	return out
}

// over takes out and returns a connection to close, where there are too many that are kept as c is; nil: there are not.
// It is called with mu.
func (l *Listener) over(c *conn) *conn {
	var kind []*conn
	for _, o := range l.open {
		if o.kept == c.kept {
			kind = append(kind, o)
		}
	}
	if len(kind) <= l.most {
		return nil
	}
	first := kind[Crowding(kind, func(c *conn) netip.Prefix { return c.from })]
	l.remove(first)
	return first
}

// remove is called with mu.
func (l *Listener) remove(c *conn) {
	l.open = slices.DeleteFunc(l.open, func(o *conn) bool { return o == c })
}

// end closes a connection; nil is none.
func (c *conn) end() {
	if c != nil {
		_ = c.Conn.Close() // its client has more than others
	}
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
	c.of.remove(c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}

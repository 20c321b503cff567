package monitor

import (
	"net"
	"slices"
	"sync"
)

// limit is a listener with a bound on open connections: the oldest is closed when another comes, so that a client that
// keeps many open does not block others. It closes connections from addresses that are not allowed, unread.
type limit struct {
	net.Listener
	most int
	may  func(from net.Addr) bool
	mu   sync.Mutex // guards open
	open []*limited // the oldest first
}

func newLimit(l net.Listener, most int, may func(net.Addr) bool) *limit {
	return &limit{Listener: l, most: most, may: may}
}

type limited struct {
	net.Conn
	of *limit
}

// Accept returns the next connection that may be.
func (l *limit) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if !l.may(c.RemoteAddr()) {
			_ = c.Close() // nothing was written to it
			continue
		}
		return l.add(c), nil
	}
}

func (l *limit) add(c net.Conn) *limited {
	out := &limited{c, l}
	l.mu.Lock()
	l.open = append(l.open, out)
	var oldest *limited
	if len(l.open) > l.most {
		oldest = l.open[0]
		l.open = l.open[1:]
	}
	l.mu.Unlock()
	if oldest != nil {
		_ = oldest.Conn.Close() // its client has had its time
	}
	return out
}

func (c *limited) Close() error {
	c.of.mu.Lock()
	c.of.open = slices.DeleteFunc(c.of.open, func(o *limited) bool { return o == c })
	c.of.mu.Unlock()
	return c.Conn.Close()
}

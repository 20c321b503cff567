package admission

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sync/semaphore"

	"github.com/egret-project/egret/connlimit"
)

const (
	// maxArriving connections have not asked yet, and are all that somebody gets who connects and says nothing. An API
	// server's handshake and question take milliseconds: as long as fewer than this many others connect meanwhile, it
	// is heard.
	maxArriving = 256
	// maxAsking have begun a question and not ended it. That of an API server comes in one piece, so the oldest is none
	// of its.
	maxAsking = 128
	// maxBodies questions are in memory at a time, maxReview each.
	maxBodies = 32
	// maxResting wait for a further question, for restTime. An API server has one or two.
	maxResting = 64
	// maxRestingClient is how many of them an address may have: API servers may share one with pods, where traffic of
	// pods is masqueraded.
	maxRestingClient = 8
)

// stage is how far a connection has got. Each has a bound of its own, so that those who fill one take nothing of the
// others.
type stage int

const (
	arriving  stage = iota // the handshake, and the header of the first question
	asking                 // the rest of a question
	answering              // the question is whole: it is answered, whatever else comes
	resting                // the answer is written, the client may ask again
)

// connections are a listener's, with bounds that a client who floods the port reaches, and an API server does not.
// Nobody is known before he shows a certificate, and most API servers show none; also, pods may come with the address
// of the API server's node. So what counts is how far a connection has got. Where too many are arriving or asking, the
// client that has most of these loses the oldest of them: one that goes on without waiting is the youngest. One whose
// question is whole, or that rests, is never closed to make room: an API server that loses the connection it just asked
// by does not ask again, and failurePolicy decides. Where no more may rest, the answer says that the connection ends
// with it.
type connections struct {
	net.Listener
	bodies *semaphore.Weighted
	mu     sync.Mutex // guards what follows, and stages
	open   []*connection
}

type connection struct {
	net.Conn
	all   *connections
	from  netip.Prefix
	stage stage
	body  bool // it has one of bodies
	rests bool // it is one of those that rest, or are to when they are answered
}

func newConnections(l net.Listener) *connections {
	return &connections{Listener: l, bodies: semaphore.NewWeighted(maxBodies)}
}

// Accept returns the next connection.
func (l *connections) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	out := &connection{Conn: c, all: l}
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		out.from = connlimit.Client(tcp.AddrPort().Addr())
	}
	l.mu.Lock()
	l.open = append(l.open, out)
	over := l.over(maxArriving, func(c *connection) bool { return c.stage == arriving })
	l.mu.Unlock()
	over.end()
	return out, nil
}

// over returns a connection to close, and takes it out, where more than most are of a kind: the oldest of the client
// that has most of them. It is called with mu.
func (l *connections) over(most int, of func(*connection) bool) *connection {
	var kind []*connection
	for _, c := range l.open {
		if of(c) {
			kind = append(kind, c)
		}
	}
	if len(kind) <= most {
		return nil
	}
	first := kind[connlimit.Crowding(kind, func(c *connection) netip.Prefix { return c.from })]
	l.remove(first)
	return first
}

// remove is called with mu.
func (l *connections) remove(c *connection) {
	l.open = slices.DeleteFunc(l.open, func(o *connection) bool { return o == c })
}

// end closes a connection; nil is none.
func (c *connection) end() {
	if c != nil {
		_ = c.Conn.Close() // its client has more than others
	}
}

// Close closes the connection.
func (c *connection) Close() error {
	c.all.mu.Lock()
	c.all.remove(c)
	c.all.mu.Unlock()
	return c.Conn.Close()
}

type connectionKey struct{}

// inContext is http.Server's ConnContext.
func inContext(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	return context.WithValue(ctx, connectionKey{}, c)
}

// changed is http.Server's ConnState: a connection whose answer is written rests, if it may. Else it is as one that has
// not asked yet: some requests http.Server answers by itself.
func changed(c net.Conn, to http.ConnState) {
	t, ok := c.(*tls.Conn)
	if !ok || to != http.StateIdle {
		return
	}
	if c, ok := t.NetConn().(*connection); ok {
		c.all.mu.Lock()
		if c.stage = arriving; c.rests {
			c.stage = resting
		}
		c.all.mu.Unlock()
	}
}

// limit has h answer within the bounds. The connection ends with the answer, unless h finds that it may rest; see
// whole.
func (l *connections) limit(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := r.Context().Value(connectionKey{}).(*connection)
		if !ok { // never: the server has no other connections
			http.Error(w, "no connection of this listener", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Connection", "close")
		ctx, cancel := context.WithTimeout(r.Context(), callTimeout)
		defer cancel()
		if err := c.ask(ctx); err != nil {
			http.Error(w, "too many questions at a time", http.StatusServiceUnavailable)
			return
		}
		defer c.asked()
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}

// ask waits until there is room for the body of a question. Those who take their time with theirs make it.
func (c *connection) ask(ctx context.Context) error {
	l := c.all
	l.mu.Lock()
	// The order of open is that of their beginning: of arriving, and now of asking.
	l.remove(c)
	c.stage = asking
	l.open = append(l.open, c)
	over := l.over(maxAsking, func(c *connection) bool { return c.stage == asking })
	l.mu.Unlock()
	over.end()
	if !l.bodies.TryAcquire(1) {
		l.mu.Lock()
		slow := l.over(0, func(c *connection) bool { return c.stage == asking && c.body })
		l.mu.Unlock()
		slow.end()
		if err := l.bodies.Acquire(ctx, 1); err != nil {
			return err
		}
	}
	l.mu.Lock()
	c.body = true
	l.mu.Unlock()
	return nil
}

func (c *connection) asked() {
	c.all.mu.Lock()
	c.body = false
	c.all.mu.Unlock()
	c.all.bodies.Release(1)
}

// whole says that a connection's question is there as a whole, and lets it rest when that is answered, if there is
// room.
func whole(ctx context.Context, answer http.Header) {
	c, ok := ctx.Value(connectionKey{}).(*connection)
	if !ok {
		return
	}
	l := c.all
	l.mu.Lock()
	defer l.mu.Unlock()
	c.stage = answering
	all, own := 0, 0
	for _, o := range l.open {
		if o.rests && o != c {
			all++
			if o.from == c.from {
				own++
			}
		}
	}
	if c.rests = all < maxResting && own < maxRestingClient; c.rests {
		answer.Del("Connection")
	}
}

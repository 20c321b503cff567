package monitor

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/connlimit"
)

// maxRoot is how many connections root may have open at a time.
const maxRoot = 8

// audience is whom a page of questions is for, beside root.
type audience int

const (
	readers  audience = iota // the Readers of Config
	tracers                  // and its Tracers
	everyone                 // who may see the metrics
)

// question is what answers GET of a path; the zero question: nothing does.
type question struct {
	http.Handler
	by audience
}

// questions are the pages that a daemon answers to those alone who may know of single pods, and those that are for
// more.
type questions struct {
	mu sync.Mutex // guards of
	of map[string]question
}

func (q *questions) add(path string, page question) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.of == nil {
		q.of = map[string]question{}
	}
	q.of[path] = page
}

func (q *questions) page(path string) question {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.of[path]
}

// Page registers what answers GET of a path, for root (ServeRoot) and for the Readers of Config, in place of what
// answered it.
func (s *Server) Page(path string, h http.Handler) { s.questions.add(path, question{h, readers}) }

// Trace registers what answers GET of a path likewise, for the Tracers of Config, too.
func (s *Server) Trace(path string, h http.Handler) { s.questions.add(path, question{h, tracers}) }

// Share registers what answers GET of a path likewise, for every client of Remote: it is to tell nothing that /metrics
// does not.
func (s *Server) Share(path string, h http.Handler) { s.questions.add(path, question{h, everyone}) }

// ServeHTTP answers who may know.
func (q *questions) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	page := q.page(r.URL.Path)
	if page.Handler == nil {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	page.ServeHTTP(w, r)
}

// forOthers answers clients whose certificate, which was verified, lets them ask, by the names of Config.
func (q *questions) forOthers(c Config) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		verified := r.TLS != nil && len(r.TLS.VerifiedChains) > 0
		page, names, options := q.page(r.URL.Path), c.Readers, "--who-clients"
		if page.by == tracers {
			names, options = slices.Concat(names, c.Tracers), options+" and --trace-clients"
		}
		switch {
		case verified && page.by == everyone:
		case len(names) == 0:
			http.NotFound(w, r)
			return
		case !verified || !slices.Contains(names, r.TLS.VerifiedChains[0][0].Subject.CommonName):
			http.Error(w, "the name in the client's certificate is none of "+options, http.StatusForbidden)
			return
		}
		q.ServeHTTP(w, r)
	})
}

// ServeRoot answers the pages of Page, Trace and Share to processes of root that connect to a listener of a unix
// socket, until ctx ends, and then returns nil. The kernel says who they are. The listener stays open: it may stand for
// more.
func (s *Server) ServeRoot(ctx context.Context, l net.Listener) error {
	err := serveOn(ctx, connlimit.New(rootListener{l, s.Log}, maxRoot, nil), methodGet(&s.questions), s.Log)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func methodGet(h http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /", h)
	return mux
}

// rootListener closes connections of others than root unread.
type rootListener struct {
	net.Listener
	log *slog.Logger
}

// Accept returns the next connection of root's.
func (l rootListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if isRoot(c) {
			return c, nil
		}
		_ = c.Close() // nothing was written to it
	}
}

// Close ends Accept, and leaves the listener open.
func (l rootListener) Close() error {
	if d, ok := l.Listener.(interface{ SetDeadline(time.Time) error }); ok {
		return d.SetDeadline(time.Now())
	}
	return l.Listener.Close()
}

// isRoot reports whether the process at the other end is root's of this user namespace.
func isRoot(c net.Conn) bool {
	who, err := Peer(c)
	return err == nil && who.Uid == 0
}

// Peer returns the process at the other end of a connection by a unix socket, as the kernel says who it is: the one
// that connected, or that listened.
func Peer(c net.Conn) (who *unix.Ucred, err error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.New("no connection by a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	failed := raw.Control(func(fd uintptr) { who, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return who, errors.Join(failed, err)
}

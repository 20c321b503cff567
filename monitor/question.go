package monitor

import (
	"context"
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

// questions are the pages that a daemon answers to those alone who may know of single pods, and those that are for who
// may see its metrics, too.
type questions struct {
	mu            sync.Mutex // guards what follows
	pages, shared map[string]http.Handler
}

// Page registers what answers GET of a path, for root (ServeRoot) and for the Readers of Config, in place of what
// answered it.
func (s *Server) Page(path string, h http.Handler) {
	s.questions.mu.Lock()
	defer s.questions.mu.Unlock()
	if s.questions.pages == nil {
		s.questions.pages = map[string]http.Handler{}
	}
	s.questions.pages[path] = h
}

// Share registers what answers GET of a path, for root and for every client of Remote: it is to tell nothing that
// /metrics does not.
func (s *Server) Share(path string, h http.Handler) {
	s.questions.mu.Lock()
	defer s.questions.mu.Unlock()
	if s.questions.shared == nil {
		s.questions.shared = map[string]http.Handler{}
	}
	s.questions.shared[path] = h
}

// page returns what answers a path; nil: nothing does. shared: it is for every client of Remote.
func (q *questions) page(path string) (page http.Handler, shared bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if page, shared = q.shared[path]; shared {
		return page, true
	}
	return q.pages[path], false
}

// ServeHTTP answers who may know.
func (q *questions) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	page, _ := q.page(r.URL.Path)
	if page == nil {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	page.ServeHTTP(w, r)
}

// forReaders answers clients whose certificate, which was verified, has one of the names, and any other one as far as
// pages are shared.
func (q *questions) forReaders(names []string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		verified := r.TLS != nil && len(r.TLS.VerifiedChains) > 0
		_, shared := q.page(r.URL.Path)
		switch {
		case verified && shared:
		case len(names) == 0:
			http.NotFound(w, r)
			return
		case !verified || !slices.Contains(names, r.TLS.VerifiedChains[0][0].Subject.CommonName):
			http.Error(w, "the name in the client's certificate is none of --who-clients", http.StatusForbidden)
			return
		}
		q.ServeHTTP(w, r)
	})
}

// ServeRoot answers the pages of Page to processes of root that connect to a listener of a unix socket, until ctx ends,
// and then returns nil. The kernel says who they are. The listener stays open: it may stand for more.
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
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	root := false
	err = raw.Control(func(fd uintptr) {
		who, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		root = err == nil && who.Uid == 0
	})
	return err == nil && root
}

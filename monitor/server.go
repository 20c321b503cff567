package monitor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/connlimit"
)

// What one client may take, and for how long. A scrape of 1,000 egress IPs is 2 MB and takes milliseconds; a question
// is a line.
const (
	maxLocal    = 32 // connections, of the node's own processes
	maxRemote   = 8
	maxHeader   = 4 << 10 // bytes; net/http reads as many again before it gives up
	readTimeout = 2 * time.Second
	sendTimeout = 10 * time.Second
	// panicInterval bounds the log of somebody who asks what panics again and again.
	panicInterval = 10 * time.Second
)

// Config says where to listen, and for what. The zero Config listens nowhere.
type Config struct {
	// Local is a loopback address and a port, for /healthz, /readyz, /metrics and /log-level; "": none.
	Local string
	// Remote is an address and a port for /metrics and the pages of Share, over TLS; "": none. An IPv4 address may be in
	// brackets, too.
	Remote string
	TLS    TLS // of Remote
	// Readers are the common names of the client certificates by which Remote also answers the questions of Page and
	// Trace, Tracers those by which it answers the questions of Trace alone; nil: it answers nobody.
	Readers, Tracers []string
	// Metrics are what /metrics shows; nil: there is no such page.
	Metrics prometheus.Gatherer
	Level   *LogLevel    // what /log-level reads and sets; nil: there is no such page
	Log     *slog.Logger // nil: none
}

// Validate returns all that is wrong with the Config, by the options that commands have for it.
func (c Config) Validate() error {
	var errs []error
	if c.Local != "" {
		if !IsLocal(c.Local) {
			errs = append(errs, fmt.Errorf("--status-address %q: want a loopback address and a port, like 127.0.0.1:8481; others ask at --metrics-address", c.Local))
		}
	}
	if c.Remote == "" {
		if len(c.Readers)+len(c.Tracers) > 0 {
			errs = append(errs, errors.New("--who-clients, --trace-clients: there are clients at --metrics-address alone: want that too"))
		}
		return errors.Join(errs...)
	}
	at, err := parseAddrPort(c.Remote)
	local, lerr := netip.ParseAddrPort(c.Local)
	switch {
	case err != nil || at.Addr().IsLoopback() || at.Port() == 0:
		errs = append(errs, fmt.Errorf("--metrics-address %q: want an address of this node and a port, like 10.0.0.1:8481", c.Remote))
	case at.Addr().IsUnspecified() && lerr == nil && at.Port() == local.Port():
		errs = append(errs, fmt.Errorf("--metrics-address %q: all addresses are that of --status-address %s too: want one address of this node, or another port", c.Remote, c.Local))
	}
	for _, name := range slices.Concat(c.Readers, c.Tracers) {
		if strings.TrimSpace(name) == "" {
			errs = append(errs, errors.New("--who-clients, --trace-clients: want common names of client certificates, none of them empty"))
		}
	}
	return errors.Join(append(errs, c.TLS.Validate())...)
}

// parseAddrPort reads an address and a port. Brackets may be around an IPv4 address, too: who puts the two together,
// like a pod's argument [$(HOST_IP)]:8481, does not know of which family the address is.
func parseAddrPort(text string) (netip.AddrPort, error) {
	if host, port, err := net.SplitHostPort(text); err == nil && strings.HasPrefix(text, "[") && !strings.Contains(host, ":") {
		text = host + ":" + port
	}
	return netip.ParseAddrPort(text)
}

// IsLocal reports whether an address is a loopback address and a port, as Local has to be.
func IsLocal(address string) bool {
	at, err := netip.ParseAddrPort(address)
	return err == nil && at.Addr().IsLoopback() && at.Port() != 0
}

// Server serves what Config says. Its methods are safe for concurrent use.
type Server struct {
	Config
	live, ready *checks
	questions   questions
}

// New returns a Server that does nothing yet.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{Config: cfg, live: &checks{}, ready: &checks{}}
}

// Live registers a check of /healthz under a name, in place of one that has the name: an error of it says that a
// restart is the remedy. Checks run at each question, and are to return at once: one that has not returned after a
// second counts as failed.
func (s *Server) Live(name string, check func() error) { s.live.add(name, check) }

// Ready registers a check of /readyz likewise: an error of it says that the daemon cannot do its work at present.
func (s *Server) Ready(name string, check func() error) { s.ready.add(name, check) }

// Run serves until ctx ends, and then returns nil. An address that cannot be had is logged and tried again.
func (s *Server) Run(ctx context.Context) error {
	local, remote := s.pages()
	var g errgroup.Group
	if s.Local != "" {
		g.Go(func() error {
			serve(ctx, s.Local, local, s.Log, func(l net.Listener) net.Listener { return connlimit.New(l, maxLocal, isLoopback) })
			return nil
		})
	}
	if s.Remote != "" {
		reload := &certificates{files: s.TLS, log: s.Log}
		g.Go(func() error {
			serve(ctx, s.Remote, remote, s.Log, func(l net.Listener) net.Listener { return reload.listener(connlimit.New(l, maxRemote, nil)) })
			return nil
		})
	}
	return g.Wait()
}

// pages returns what is answered at Local and at Remote.
func (s *Server) pages() (local, remote *http.ServeMux) {
	metrics := http.NotFoundHandler()
	if s.Metrics != nil {
		metrics = newPage(s.Metrics, s.Log)
	}
	local, remote = http.NewServeMux(), http.NewServeMux()
	local.Handle("GET /healthz", s.live)
	local.Handle("GET /readyz", s.ready)
	local.Handle("GET /metrics", metrics)
	if s.Level != nil {
		local.Handle("GET /log-level", levelPage{s.Level, s.Log})
		local.Handle("PUT /log-level", levelPage{s.Level, s.Log})
	}
	remote.Handle("GET /metrics", metrics)
	remote.Handle("GET /", s.questions.forOthers(s.Config))
	return local, remote
}

// ServeLocal serves h at a loopback address, as a Server does at Local, until ctx ends, with at most so many
// connections open. An address that cannot be had is logged and tried again. A handler that answers for longer than a
// client may take sets the deadlines itself (http.ResponseController).
func ServeLocal(ctx context.Context, address string, most int, h http.Handler, log *slog.Logger) {
	serve(ctx, address, h, log, func(l net.Listener) net.Listener { return connlimit.New(l, most, isLoopback) })
}

// ServeTLS serves h at an address over TLS, as ServeLocal does at a loopback one, with as many connections more of whom
// h knows (connlimit.Keep).
func ServeTLS(ctx context.Context, address string, files TLS, most int, h http.Handler, log *slog.Logger) {
	reload := &certificates{files: files, log: log}
	serve(ctx, address, h, log, func(l net.Listener) net.Listener { return reload.listener(connlimit.New(l, most, nil)) })
}

// serve listens, and listens again, until ctx ends.
func serve(ctx context.Context, address string, h http.Handler, log *slog.Logger, wrap func(net.Listener) net.Listener) {
	const minBackoff, maxBackoff = 100 * time.Millisecond, 5 * time.Second
	said := ""
	for backoff := minBackoff; ctx.Err() == nil; backoff = min(2*backoff, maxBackoff) {
		var listen net.ListenConfig
		l, err := listen.Listen(ctx, "tcp", address)
		if err == nil {
			said = ""
			err = serveOn(ctx, wrap(l), h, log)
		}
		if ctx.Err() != nil {
			return
		}
		if text := err.Error(); text != said {
			said = text
			log.Warn("address is not served, will retry", "address", address, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
	}
}

// serveOn serves until ctx ends or the listener fails. One request a connection: nothing is kept for a client that
// comes every half minute.
func serveOn(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler: tellPanics(h, log), MaxHeaderBytes: maxHeader, ReadTimeout: readTimeout, WriteTimeout: sendTimeout,
		ConnContext: connlimit.Context,
		// What a client does wrong is not the operator's, and would fill the log.
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	server.SetKeepAlivesEnabled(false)
	defer context.AfterFunc(ctx, func() { _ = server.Close() })() // whoever waits for an answer asks again
	return server.Serve(l)
}

// tellPanics logs the panics of h, one in panicInterval, and closes the connection. net/http would tell them where it
// tells what clients do wrong.
func tellPanics(h http.Handler, log *slog.Logger) http.Handler {
	var mu sync.Mutex // guards told
	var told time.Time
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if now := time.Now(); v != http.ErrAbortHandler && now.Sub(told) >= panicInterval {
				told = now
				log.Error("a question could not be answered: report this",
					"path", r.URL.Path, "err", v, "stack", string(debug.Stack()))
			}
			panic(http.ErrAbortHandler) // a question must not end the daemon: net/http takes this silently
		}()
		h.ServeHTTP(w, r)
	})
}

func isLoopback(a net.Addr) bool {
	from, ok := a.(*net.TCPAddr)
	return ok && from.IP.IsLoopback()
}

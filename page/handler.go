package page

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/egret-project/egret/operator"
)

//go:embed static
var static embed.FS

// files are what the page consists of, by path.
var files = map[string]struct{ name, kind string }{
	"/{$}":         {"static/index.html", "text/html; charset=utf-8"},
	"/app.js":      {"static/app.js", "text/javascript; charset=utf-8"},
	"/table.js":    {"static/table.js", "text/javascript; charset=utf-8"},
	"/style.css":   {"static/style.css", "text/css; charset=utf-8"},
	"/favicon.svg": {"static/favicon.svg", "image/svg+xml"},
}

// policy lets a browser load and run what this server serves, and nothing else; and no text become HTML or a script.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

const (
	// sendTimeout is how long a viewer may take for what was sent to it.
	sendTimeout = 10 * time.Second
	// answerTimeout is how long a question waits for etcd's first answer, and for the other questions of its client.
	// What it takes itself is some 0.1 s with 1,000 egresses and 5,000 nodes, and is not cut off.
	answerTimeout = 5 * time.Second
	// quiet is after how long without changes a comment is sent, by which both ends see that the other is there.
	quiet = 15 * time.Second
	// comeBack is what a stream begins with: in how many milliseconds a browser is to come again when it has ended, as
	// Access has it. Browsers wait for some seconds else.
	comeBack = "retry: 500\n\n"
	// maxHits and maxPods are how much of a list is sent: what a person looks through.
	maxHits, maxPods = 20, 500
	// maxText bounds what is looked for: no name of Kubernetes' is longer, a namespace and a name together.
	maxText = 512
)

// Handler returns what answers the page's requests, of whomever: see Local and Access.
func (p *Page) Handler() http.Handler {
	mux := http.NewServeMux()
	for path, f := range files {
		body, err := static.ReadFile(f.name)
		if err != nil {
			panic(err) // the files are in the binary
		}
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", f.kind)
			_, _ = w.Write(body) // who asked has gone
		})
	}
	mux.HandleFunc("GET /state", p.state)
	mux.HandleFunc("GET /events", p.events)
	mux.HandleFunc("GET /trace", p.trace)
	mux.HandleFunc("GET /describe", p.describe)
	mux.HandleFunc("GET /search", p.search)
	mux.HandleFunc("GET /traffic", p.traffic)
	return guard(mux)
}

// guard sets what every answer has, and refuses what a page of another site asks for.
func guard(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		head := w.Header()
		head.Set("Content-Security-Policy", policy)
		head.Set("X-Content-Type-Options", "nosniff")
		head.Set("X-Frame-Options", "DENY")
		head.Set("Referrer-Policy", "no-referrer")
		head.Set("Cross-Origin-Resource-Policy", "same-origin")
		head.Set("Cross-Origin-Opener-Policy", "same-origin")
		head.Set("Cache-Control", "no-store")
		r.Body = http.NoBody
		// A link from elsewhere may open the page; nothing else of another site gets anything, also in a frame. Not all
		// browsers send the headers.
		from, into := r.Header.Get("Sec-Fetch-Site"), r.Header.Get("Sec-Fetch-Dest")
		if (from == "cross-site" || from == "same-site") && (r.URL.Path != "/" || into != "" && into != "document") {
			http.Error(w, "asked by a page of another site", http.StatusForbidden)
			return
		}
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			head.Set("Allow", "GET, HEAD")
			http.Error(w, "the page changes nothing: GET and HEAD alone", http.StatusMethodNotAllowed)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// Local answers requests at a loopback address, whose Host says that they are for one: a page that has its own name
// lead to 127.0.0.1 (DNS rebinding) sends its own.
func Local(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isLoopback(r.Host) {
			http.Error(w, "this page is for localhost, 127.0.0.1 and [::1], and the request is for another host", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// isLoopback reports whether a Host is localhost or a loopback address, with a port or without.
func isLoopback(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && ip.IsLoopback()
}

// fail answers with an error of Page's own.
func fail(w http.ResponseWriter, err error) {
	w.Header().Set("Retry-After", "5")
	http.Error(w, err.Error(), http.StatusServiceUnavailable)
}

// reply answers a question by what is shown. Its client has no other one answered meanwhile, and answerTimeout in all.
func (p *Page) reply(w http.ResponseWriter, r *http.Request, answer func(*shown) (any, error)) {
	p.answer(w, r, &p.questions, func(_ context.Context, now *shown) (any, error) { return answer(now) })
}

// answer is reply for questions that wait in a queue of their own, and for others than the page's records, until ctx
// ends.
func (p *Page) answer(w http.ResponseWriter, r *http.Request, q *queues, answer func(context.Context, *shown) (any, error)) {
	conn := http.NewResponseController(w)
	_ = conn.SetReadDeadline(time.Time{}) // as with events
	b, err := p.compute(r, q, answer)
	var none notFound
	switch {
	case errors.As(err, &none):
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	case err != nil:
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = conn.SetWriteDeadline(time.Now().Add(sendTimeout)) // as with events
	_, _ = w.Write(append(b, '\n'))                        // who asked has gone
}

// notFound is the error of a question about what there is not.
type notFound struct{ error }

// compute returns the answer to a question as JSON. Sending it is beside the queue: who reads slowly is in nobody's
// way.
func (p *Page) compute(r *http.Request, q *queues, answer func(context.Context, *shown) (any, error)) ([]byte, error) {
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	now, err := p.current(ctx)
	if err != nil {
		return nil, err
	}
	leave, err := q.enter(ctx, client(r))
	if err != nil {
		return nil, errBusy
	}
	defer leave()
	v, err := answer(ctx, now)
	if err != nil {
		return nil, notFound{err}
	}
	return json.Marshal(v)
}

// state answers with the whole state, as a Change from none.
func (p *Page) state(w http.ResponseWriter, r *http.Request) {
	p.reply(w, r, func(now *shown) (any, error) {
		return Change{Revision: now.Revision, Whole: true, Put: now.Objects}, nil
	})
}

// events sends the whole state, and then what changes, as server-sent events.
func (p *Page) events(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodHead {
		return
	}
	v, err := p.join(r.Context(), client(r))
	if err != nil {
		fail(w, err)
		return
	}
	defer p.leave(v)
	conn := http.NewResponseController(w)
	_ = conn.SetReadDeadline(time.Time{}) // nothing more is read; one that passes would end the request
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // nginx and others would gather what is sent
	_, _ = io.WriteString(w, comeBack)        // who has gone is seen below
	beat := time.NewTicker(quiet)
	defer beat.Stop()
	for {
		text := []byte(":\n\n")
		select {
		case next, ok := <-v.events:
			if !ok {
				return
			}
			text = next
			beat.Reset(quiet)
		case <-beat.C:
		case <-r.Context().Done():
			return
		}
		_ = conn.SetWriteDeadline(time.Now().Add(sendTimeout)) // where there is none to set, the client is the test's
		if _, err := w.Write(text); err != nil || conn.Flush() != nil {
			return
		}
	}
}

// trace answers how a pod leaves, where it is asked for so with what it sends: to an address, by a protocol, for a
// port. A client has one such question at a time, beside its others.
func (p *Page) trace(w http.ResponseWriter, r *http.Request) {
	asked := r.URL.Query()
	q := operator.Question{Pod: asked.Get("pod")}
	if to := asked.Get("to"); to != "" {
		ip, err := netip.ParseAddr(to)
		if err != nil || len(to) > maxText {
			http.Error(w, "to: want an IPv4 or IPv6 address", http.StatusBadRequest)
			return
		}
		q.To = ip.Unmap()
	}
	port, err := strconv.Atoi(cmp.Or(asked.Get("port"), "0"))
	if err != nil {
		http.Error(w, "port: want a number from 1 to 65535", http.StatusBadRequest)
		return
	}
	if err := q.Of(asked.Get("protocol"), port); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := operator.CheckDescribed("pod", q.Pod); err != nil || len(q.Pod) > maxText {
		http.Error(w, "pod: want namespace/name", http.StatusBadRequest)
		return
	}
	p.answer(w, r, &p.traces, func(ctx context.Context, now *shown) (any, error) { return p.traceIn(ctx, now, q) })
}

// description is the answer of describe.
type description struct {
	Rows [][]string     `json:"rows"`
	Pods []operator.Hit `json:"pods,omitempty"`
	Left int            `json:"left,omitempty"` // pods that are not in Pods
}

// describe answers with what there is to say of an egress, an IP, a node or a pool.
func (p *Page) describe(w http.ResponseWriter, r *http.Request) {
	kind, name := r.URL.Query().Get("kind"), r.URL.Query().Get("name") // FormValue would read a body
	if err := operator.CheckDescribed(kind, name); err != nil || len(name) > maxText {
		http.Error(w, "kind and name: want one of egress, ip, node, pod, pool, and its name", http.StatusBadRequest)
		return
	}
	p.reply(w, r, func(now *shown) (any, error) {
		rows, err := operator.DescribeIn(now.whole, now.tenures, kind, name, time.Now())
		if err != nil {
			return nil, err
		}
		pods := operator.PodsOf(now.whole, kind, name)
		most := min(len(pods), maxPods)
		return description{rows, pods[:most], len(pods) - most}, nil
	})
}

// search answers with what has a name or an IP like the text.
func (p *Page) search(w http.ResponseWriter, r *http.Request) {
	text := r.URL.Query().Get("q")
	if len(text) > maxText {
		http.Error(w, "q: longer than any name", http.StatusBadRequest)
		return
	}
	p.reply(w, r, func(now *shown) (any, error) {
		return append([]operator.Hit{}, operator.Find(now.whole, text, maxHits)...), nil // none is [], not null
	})
}

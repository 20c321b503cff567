package page

import (
	"context"
	"crypto/sha256"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// reviewedFor is how long the answer to a token counts: who loses the right looks on for that long.
	reviewedFor = 10 * time.Second
	// maxReviewed bounds the answers that are remembered, and maxReviews the questions that are asked at a time:
	// whoever sends tokens that are none costs the API server as much and no more. The others wait, of a client one at
	// a time, so that he is in the way of nobody else for longer than a question takes.
	maxReviewed, maxReviews = 256, 4
	// reviewTimeout is how long who asks may wait for his turn and for the API server.
	reviewTimeout = 5 * time.Second
	// maxStream is after how long who follows the changes has to come again. A browser does so by itself.
	maxStream = 5 * time.Minute
	// reviewAgain is how often a token is looked at meanwhile.
	reviewAgain = 30 * time.Second
	// refusedFor is for how long who may not look keeps a connection after the answer.
	refusedFor = time.Second
	// maxToken bounds a token in bytes. Those of Kubernetes are some 1,000.
	maxToken = 8 << 10
)

// Access says who may look, of those who come over the network. The zero Access lets nobody.
type Access struct {
	// Names are the common names of client certificates, which TLS has verified, that may.
	Names []string
	// Review says whether the bearer of a token may; an error says that this is not known. nil: no token may. It is
	// called by several at a time.
	Review func(ctx context.Context, token string) (bool, error)
	Log    *slog.Logger // nil: nothing is logged

	clients queues // of tokens

	mu       sync.Mutex // guards what follows
	reviewed map[[sha256.Size]byte]review
	asking   chan struct{} // capacity maxReviews
}

// review is the answer to a token, which is remembered by its hash.
type review struct {
	may   bool
	until time.Time
}

// Restrict answers who may look, for as long as he may.
func (a *Access) Restrict(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := http.NewResponseController(w)
		_ = conn.SetReadDeadline(time.Time{}) // as with events: it would end the wait for a turn
		if status, why := a.refuse(r); status != 0 {
			_ = conn.SetReadDeadline(time.Now().Add(refusedFor)) // for the body that the server waits for after the answer
			if status == http.StatusUnauthorized {
				w.Header().Set("WWW-Authenticate", "Bearer")
			}
			w.Header().Set("Cache-Control", "no-store")
			http.Error(w, why, status)
			return
		}
		until := time.Now().Add(maxStream)
		if a.named(r) {
			if ends := r.TLS.VerifiedChains[0][0].NotAfter; ends.Before(until) && !ends.IsZero() {
				until = ends
			}
		}
		ctx, cancel := context.WithDeadline(r.Context(), until)
		defer cancel()
		r = r.WithContext(ctx)
		if !a.named(r) {
			go func() {
				defer cancel()
				defer func() {
					if v := recover(); v != nil && a.Log != nil {
						a.Log.Error("who follows the status page could not be looked at again: report this", "err", v)
					}
				}()
				a.follow(r)
			}()
		}
		h.ServeHTTP(w, r)
	})
}

// follow returns when the bearer of a request's token may look no more, or the request ends. While that is not known he
// may.
func (a *Access) follow(r *http.Request) {
	again := time.NewTicker(reviewAgain)
	defer again.Stop()
	for {
		select {
		case <-again.C:
			if may, err := a.review(r, bearer(r)); err == nil && !may {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

// certified reports whether TLS has verified a certificate of who asks.
func certified(r *http.Request) bool { return r.TLS != nil && len(r.TLS.VerifiedChains) > 0 }

// named reports whether a certificate lets who asks look.
func (a *Access) named(r *http.Request) bool {
	return certified(r) && slices.Contains(a.Names, r.TLS.VerifiedChains[0][0].Subject.CommonName)
}

// bearer returns the token that a request has; "": none.
func bearer(r *http.Request) string {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if token == r.Header.Get("Authorization") {
		return ""
	}
	return token
}

// refuse returns 0, or the status with which a request is refused and why.
func (a *Access) refuse(r *http.Request) (status int, why string) {
	if a.named(r) {
		return 0, ""
	}
	token := bearer(r)
	switch {
	case token == "" || len(token) > maxToken || a.Review == nil:
		if certified(r) {
			return http.StatusForbidden, "the name in the client's certificate is none of --page-clients"
		}
		return http.StatusUnauthorized, "want a bearer token of Kubernetes for the audience " + Audience + ", or a client certificate"
	case r.TLS == nil:
		return http.StatusForbidden, "a token is taken over TLS alone"
	}
	may, err := a.review(r, token)
	switch {
	case err != nil:
		if a.Log != nil {
			a.Log.Warn("who may see the status page is not known, will retry", "err", err)
		}
		return http.StatusServiceUnavailable, "it is not known at present whether you may look: try again"
	case !may:
		return http.StatusForbidden, "the bearer of this token may not look: it takes the audience " + Audience +
			" and the verb get of the non-resource URL " + URL
	}
	return 0, ""
}

// URL is the non-resource URL that who looks has to have the verb get of, in Kubernetes' RBAC.
const URL = "/egret/page"

// Audience is whom a token has to be for. One that is for the API server is not taken: it would be worth more to
// whoever breaks into the page than the page is.
const Audience = "egret-page"

// review asks, or remembers the answer.
func (a *Access) review(r *http.Request, token string) (bool, error) {
	key := sha256.Sum256([]byte(token))
	if may, known := a.known(key); known {
		return may, nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), reviewTimeout)
	defer cancel()
	leave, err := a.clients.enter(ctx, client(r))
	if err != nil {
		return false, errTooManyReviews
	}
	defer leave()
	if may, known := a.known(key); known { // who was before has asked the same
		return may, nil
	}
	end, err := a.turn(ctx)
	if err != nil {
		return false, err
	}
	defer end()
	may, err := a.Review(ctx, token)
	if err != nil {
		return false, err
	}
	a.remember(key, may)
	return may, nil
}

// turn waits until a question may be asked, and returns what lets the next one be asked. Who waits longest is first.
func (a *Access) turn(ctx context.Context) (end func(), err error) {
	a.mu.Lock()
	if a.asking == nil {
		a.asking = make(chan struct{}, maxReviews)
	}
	asking := a.asking
	a.mu.Unlock()
	select {
	case asking <- struct{}{}:
		return func() { <-asking }, nil
	case <-ctx.Done():
		return nil, errTooManyReviews
	}
}

// known returns the answer that is remembered.
func (a *Access) known(key [sha256.Size]byte) (may, known bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r, ok := a.reviewed[key]
	return r.may, ok && time.Now().Before(r.until)
}

func (a *Access) remember(key [sha256.Size]byte, may bool) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.reviewed == nil {
		a.reviewed = map[[sha256.Size]byte]review{}
	}
	for k, known := range a.reviewed {
		if len(a.reviewed) >= maxReviewed || !now.Before(known.until) {
			delete(a.reviewed, k)
		}
	}
	a.reviewed[key] = review{may, now.Add(reviewedFor)}
}

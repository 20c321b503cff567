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

	"github.com/egret-project/egret/connlimit"
)

const (
	// reviewedFor is how long the answer to a token counts: who loses the right looks on for that long.
	reviewedFor = 10 * time.Second
	// trustedFor is for how long a token by which somebody could look waits for none of others when it is looked at
	// again: who sends tokens that are none, also from his address, is not in his way.
	trustedFor = 24 * time.Hour
	// maxReviewed bounds the answers of a kind that are remembered, and maxReviews the questions that are asked at a
	// time of tokens that are trusted, and of others: whoever sends tokens that are none costs the API server as much
	// and no more. The others wait, of a client one at a time, so that he is in the way of no other client for longer
	// than a question takes.
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

	clients          queues // of tokens that are not trusted
	trusted, unknown turns

	mu   sync.Mutex // guards what follows
	may  answers    // tokens by which somebody could look
	none answers    // others
}

// answers are until when the answers to tokens count, by the hash of each. They are kept beyond that.
type answers map[[sha256.Size]byte]time.Time

// add adds an answer, in place of that which ended first where there are too many.
func (a *answers) add(key [sha256.Size]byte) {
	if *a == nil {
		*a = answers{}
	}
	for delete(*a, key); len(*a) >= maxReviewed; {
		oldest := key
		for k, until := range *a {
			if oldest == key || until.Before((*a)[oldest]) {
				oldest = k
			}
		}
		delete(*a, oldest)
	}
	(*a)[key] = time.Now().Add(reviewedFor)
}

// turns are those of questions to the API server.
type turns struct {
	once   sync.Once
	asking chan struct{} // capacity maxReviews
}

// wait waits until a question may be asked, and returns what lets the next one be asked. Who waits longest is first.
func (t *turns) wait(ctx context.Context) (end func(), err error) {
	t.once.Do(func() { t.asking = make(chan struct{}, maxReviews) })
	select {
	case t.asking <- struct{}{}:
		return func() { <-t.asking }, nil
	case <-ctx.Done():
		return nil, errTooManyReviews
	}
}

// Restrict answers who may look, for as long as he may, and keeps his connection (connlimit.Keep).
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
		connlimit.Keep(r.Context())
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
	turns := &a.unknown
	if a.trusts(key) {
		connlimit.Keep(r.Context()) // others may connect meanwhile
		turns = &a.trusted
	} else {
		leave, err := a.clients.enter(ctx, client(r))
		if err != nil {
			return false, errTooManyReviews
		}
		defer leave()
	}
	end, err := turns.wait(ctx)
	if err != nil {
		return false, err
	}
	defer end()
	if may, known := a.known(key); known { // who was before has asked the same
		return may, nil
	}
	may, err := a.Review(ctx, token)
	if err != nil {
		return false, err
	}
	a.remember(key, may)
	return may, nil
}

// known returns the answer that is remembered, and counts.
func (a *Access) known(key [sha256.Size]byte) (may, known bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	may = now.Before(a.may[key])
	return may, may || now.Before(a.none[key])
}

// trusts reports whether the bearer of a token could look when he came last.
func (a *Access) trusts(key [sha256.Size]byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	until, ok := a.may[key]
	return ok && time.Since(until) < trustedFor
}

func (a *Access) remember(key [sha256.Size]byte, may bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if may {
		delete(a.none, key)
		a.may.add(key)
		return
	}
	delete(a.may, key)
	a.none.add(key)
}

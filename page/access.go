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
	// maxReviewed bounds the answers that are remembered, and maxReviews the questions that wait for one: whoever sends
	// tokens that are none costs the API server as much and no more.
	maxReviewed, maxReviews = 256, 4
	// reviewTimeout is how long the API server may take.
	reviewTimeout = 5 * time.Second
	// maxStream is after how long who follows the changes has to come again, and is looked at again. A browser does so
	// by itself.
	maxStream = 5 * time.Minute
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

	mu       sync.Mutex // guards what follows
	reviewed map[[sha256.Size]byte]review
	waiting  int
}

// review is the answer to a token, which is remembered by its hash.
type review struct {
	may   bool
	until time.Time
}

// Restrict answers who may look.
func (a *Access) Restrict(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status, why := a.refuse(r); status != 0 {
			if status == http.StatusUnauthorized {
				w.Header().Set("WWW-Authenticate", "Bearer")
			}
			w.Header().Set("Cache-Control", "no-store")
			http.Error(w, why, status)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), maxStream)
		defer cancel()
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}

// refuse returns 0, or the status with which a request is refused and why.
func (a *Access) refuse(r *http.Request) (status int, why string) {
	certified := r.TLS != nil && len(r.TLS.VerifiedChains) > 0
	if certified && slices.Contains(a.Names, r.TLS.VerifiedChains[0][0].Subject.CommonName) {
		return 0, ""
	}
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	switch {
	case !ok || token == "" || len(token) > maxToken || a.Review == nil:
		if certified {
			return http.StatusForbidden, "the name in the client's certificate is none of --page-clients"
		}
		return http.StatusUnauthorized, "want a bearer token of Kubernetes for the audience " + Audience + ", or a client certificate"
	case r.TLS == nil:
		return http.StatusForbidden, "a token is taken over TLS alone"
	}
	may, err := a.review(r.Context(), token)
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
func (a *Access) review(ctx context.Context, token string) (bool, error) {
	key, now := sha256.Sum256([]byte(token)), time.Now()
	a.mu.Lock()
	if known, ok := a.reviewed[key]; ok && now.Before(known.until) {
		a.mu.Unlock()
		return known.may, nil
	}
	if a.waiting >= maxReviews {
		a.mu.Unlock()
		return false, errTooManyReviews
	}
	a.waiting++
	a.mu.Unlock()
	may, err := a.ask(ctx, token)
	if err != nil {
		return false, err
	}
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
	return may, nil
}

// ask asks, and waits no longer also where Review panics.
func (a *Access) ask(ctx context.Context, token string) (bool, error) {
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.waiting--
	}()
	ctx, cancel := context.WithTimeout(ctx, reviewTimeout)
	defer cancel()
	return a.Review(ctx, token)
}

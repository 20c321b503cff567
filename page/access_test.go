package page

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// asked is a request over TLS with a token and a verified certificate, both of which may be "".
func asked(token, name string) *http.Request {
	r := httptest.NewRequest("GET", "https://egret.example/state", nil)
	r.TLS = &tls.ConnectionState{}
	if name != "" {
		r.TLS.VerifiedChains = [][]*x509.Certificate{{{Subject: pkix.Name{CommonName: name}}}}
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	return r
}

func status(a *Access, r *http.Request) int {
	w := httptest.NewRecorder()
	a.Restrict(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "secret") })).ServeHTTP(w, r)
	if w.Code != 200 && strings.Contains(w.Body.String(), "secret") {
		return -1
	}
	return w.Code
}

func TestWhoMayLookFromElsewhere(t *testing.T) {
	reviewer := func(_ context.Context, token string) (bool, error) {
		if token == "unknown" {
			return false, errors.New("no answer")
		}
		return token == "good", nil
	}
	plain := asked("good", "")
	plain.TLS = nil
	basic := asked("", "")
	basic.SetBasicAuth("good", "good")
	unverified := asked("", "")
	unverified.TLS.PeerCertificates = []*x509.Certificate{{Subject: pkix.Name{CommonName: "ann"}}}
	for name, tt := range map[string]struct {
		r      *http.Request
		review func(context.Context, string) (bool, error)
		want   int
	}{
		"with nothing":                                 {asked("", ""), reviewer, 401},
		"with a token that may":                        {asked("good", ""), reviewer, 200},
		"with a token that is none":                    {asked("bad", ""), reviewer, 403},
		"while nobody knows":                           {asked("unknown", ""), reviewer, 503},
		"with a token without end":                     {asked(strings.Repeat("good", 10000), ""), reviewer, 401},
		"with a token, without TLS":                    {plain, reviewer, 403},
		"with a token where none is taken":             {asked("good", ""), nil, 401},
		"with a password":                              {basic, reviewer, 401},
		"with a certificate":                           {asked("", "ann"), reviewer, 200},
		"with another's certificate":                   {asked("", "bob"), reviewer, 403},
		"with another's certificate and a token":       {asked("good", "bob"), reviewer, 200},
		"with a certificate that TLS has not verified": {unverified, reviewer, 401},
	} {
		t.Run(name, func(t *testing.T) {
			if got := status(&Access{Names: []string{"ann"}, Review: tt.review}, tt.r); got != tt.want {
				t.Errorf("status %d, want %d", got, tt.want)
			}
		})
	}
	if got := status(&Access{}, asked("", "ann")); got != 403 {
		t.Errorf("the zero Access lets in who has a certificate: %d", got)
	}
}

func TestATokenIsLookedAtAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, may := 0, true
		a := &Access{Review: func(context.Context, string) (bool, error) { n++; return may, nil }}
		for range 100 {
			if got := status(a, asked("x", "")); got != 200 {
				t.Fatalf("status %d", got)
			}
		}
		if n != 1 {
			t.Errorf("the API server was asked %d times in a moment", n)
		}
		may = false // the right was taken away
		time.Sleep(reviewedFor)
		if got := status(a, asked("x", "")); got != 403 {
			t.Errorf("who has lost the right gets %d after %v", got, reviewedFor)
		}
	})
}

func TestWhoFollowsIsLookedAtAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &Access{Names: []string{"ann"}}
		began := time.Now()
		a.Restrict(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })).ServeHTTP(httptest.NewRecorder(), asked("", "ann"))
		if took := time.Since(began); took != maxStream {
			t.Errorf("the changes were followed for %v, want %v", took, maxStream)
		}
	})
}

func TestTokensThatAreNoneAreNotAFloodForTheAPIServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		at, most := 0, 0
		a := &Access{Review: func(context.Context, string) (bool, error) {
			mu.Lock()
			at++
			most = max(most, at)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			defer mu.Unlock()
			at--
			return false, nil
		}}
		var all sync.WaitGroup
		for i := range 1000 {
			all.Go(func() { status(a, asked(fmt.Sprint("bad", i), "")) })
		}
		all.Wait()
		if most > maxReviews {
			t.Errorf("%d questions at a time", most)
		}
		for i := range 2 * maxReviewed {
			a.Review = func(context.Context, string) (bool, error) { return false, nil }
			status(a, asked(fmt.Sprint("worse", i), ""))
		}
		if len(a.reviewed) > maxReviewed {
			t.Errorf("%d answers are remembered", len(a.reviewed))
		}
	})
}

func TestReviewsThatPanicKeepNoOtherFromOne(t *testing.T) {
	a := &Access{Review: func(context.Context, string) (bool, error) { panic("no map") }}
	for i := range 2 * maxReviews {
		func() {
			defer func() { _ = recover() }() // as the server does
			status(a, asked(fmt.Sprint("bad", i), ""))
		}()
	}
	a.Review = func(context.Context, string) (bool, error) { return true, nil }
	if got := status(a, asked("good", "")); got != 200 {
		t.Errorf("status %d, want 200", got)
	}
}

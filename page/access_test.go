package page

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/connlimit"
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
		if took := following(a, asked("", "ann")); took != maxStream {
			t.Errorf("the changes were followed for %v, want %v", took, maxStream)
		}
	})
}

// The page says that the connection is lost after 5 s without one.
func TestWhoseStreamIsEndedIsToldToComeAgainAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := known()
		p.shown.State = state(map[string]string{"node a": "{}"})
		h := (&Access{Names: []string{"ann"}}).Restrict(p.Handler())
		began := time.Now()
		for range 2 {
			r, w := asked("", "ann"), httptest.NewRecorder()
			r.URL.Path = "/events"
			h.ServeHTTP(w, r)
			if body := w.Body.String(); w.Code != 200 || !strings.HasPrefix(body, "retry: 500\n\n") || !strings.Contains(body, `{"a":{}}`) {
				t.Errorf("status %d, %.100q; want when to come again, and the whole", w.Code, body)
			}
		}
		if took := time.Since(began); took != 2*maxStream {
			t.Errorf("two streams, one after the other, took %v, want %v", took, 2*maxStream)
		}
	})
}

// following follows the changes until it is ended, and returns how long that took.
func following(a *Access, r *http.Request) time.Duration {
	began := time.Now()
	a.Restrict(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })).ServeHTTP(httptest.NewRecorder(), r)
	return time.Since(began)
}

// An attempt: who had the right once keeps a connection, to look on when it was taken away, or after his token or his
// certificate has ended.
func TestWhoLosesTheRightFollowsNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var unknown atomic.Int64
		a := &Access{Names: []string{"ann"}, Review: func(context.Context, string) (bool, error) {
			switch since := time.Since(began); {
			case since < 40*time.Second:
				return true, nil
			case since < 80*time.Second:
				unknown.Add(1)
				return false, errors.New("no answer")
			}
			return false, nil
		}}
		if took := following(a, asked("x", "")); took != 90*time.Second {
			t.Errorf("whose token ended after 80 s looks on for %v, want %v", took, 90*time.Second)
		}
		if unknown.Load() != 1 {
			t.Errorf("%d questions without an answer, want 1", unknown.Load())
		}
		r := asked("", "ann")
		r.TLS.VerifiedChains[0][0].NotAfter = time.Now().Add(20 * time.Second)
		if took := following(a, r); took != 20*time.Second {
			t.Errorf("whose certificate ends in 20 s looks on for %v", took)
		}
		began = time.Now().Add(time.Hour) // the token counts again
		if took := following(a, asked("y", "")); took != maxStream {
			t.Errorf("who may looks on for %v, want %v", took, maxStream)
		}
	})
}

// Whatever a review does while somebody follows the changes, crdsync goes on.
func TestAReviewThatPanicsLaterEndsTheStreamAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		a := &Access{Log: slog.New(slog.DiscardHandler), Review: func(context.Context, string) (bool, error) {
			if time.Since(began) > 0 {
				panic("no map")
			}
			return true, nil
		}}
		if took := following(a, asked("x", "")); took != reviewAgain {
			t.Errorf("the changes were followed for %v, want %v", took, reviewAgain)
		}
	})
}

// An attempt: who may not look says that a body comes, and sends none, to keep the connection.
func TestWhoMayNotLookKeepsNoConnection(t *testing.T) {
	a := &Access{Review: func(context.Context, string) (bool, error) { return false, nil }}
	server := httptest.NewUnstartedServer(a.Restrict(http.NotFoundHandler()))
	server.Config.SetKeepAlivesEnabled(false) // as monitor serves it
	server.StartTLS()
	defer server.Close()
	c, err := tls.Dial("tcp", server.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer bad\r\nContent-Length: 100\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 403") {
		t.Errorf("%v, %.100q: want to be refused, and the end of the connection", err, answer)
	}
}

// An attempt: whoever has the address of a viewer connects until the viewer's stream is the oldest.
func TestWhoWasLetLookKeepsHisConnection(t *testing.T) {
	a := &Access{Review: func(_ context.Context, token string) (bool, error) { return token == "good", nil }}
	server := httptest.NewUnstartedServer(a.Restrict(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush() // who asked is here
		<-r.Context().Done()
	})))
	server.Listener, server.Config.ConnContext = connlimit.New(server.Listener, 4, nil), connlimit.Context
	server.StartTLS()
	t.Cleanup(server.Close) // after the clients, whom it waits for
	look := func(token string) net.Conn {
		t.Helper()
		c, err := tls.Dial("tcp", server.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() }) // the server may have
		if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", token); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 12)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	viewer := look("good")
	for range 20 {
		look("bad")
		look("")
	}
	if err := viewer.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, viewer); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the viewer's connection ended: %v", err)
	}
}

// An attempt: pods send tokens that are none, as many as they can, so that who may look is not heard.
func TestAFloodOfTokensKeepsNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		var all sync.WaitGroup
		defer all.Wait()
		defer stop()
		a := &Access{Review: func(_ context.Context, token string) (bool, error) {
			time.Sleep(20 * time.Millisecond)
			return token == "good", nil
		}}
		for pod := range 20 {
			for range 3 { // connections at a time, of each
				all.Go(func() {
					for n := 0; ctx.Err() == nil; n++ {
						r := asked(fmt.Sprint("bad ", pod, n), "")
						r.RemoteAddr = fmt.Sprintf("10.244.1.%d:%d", pod+1, 1024+n%60000)
						status(a, r)
						time.Sleep(time.Millisecond)
					}
				})
			}
		}
		var worst time.Duration
		for range 3 {
			time.Sleep(reviewedFor + time.Second)
			began := time.Now()
			r := asked("good", "")
			r.RemoteAddr = "10.0.0.7:1024"
			if got := status(a, r); got != 200 {
				t.Fatalf("who may look gets status %d", got)
			}
			worst = max(worst, time.Since(began))
		}
		if worst > time.Second {
			t.Errorf("who may look waits for %v", worst)
		}
	})
}

// An attempt: where the CNI masquerades what pods send, those of the node of a proxy have its address, and by that keep
// out whom the proxy stands for. The API server is slow, or not there for a while.
func TestAFloodOfTokensFromHisAddressKeepsNobodyOutWhoCouldLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const proxy = "10.0.0.7"
		ctx, stop := context.WithCancel(t.Context())
		var all sync.WaitGroup
		defer all.Wait()
		defer stop()
		var revoked atomic.Bool
		a := &Access{Review: func(_ context.Context, token string) (bool, error) {
			time.Sleep(200 * time.Millisecond)
			return token == "good" && !revoked.Load(), nil
		}}
		looks := func() int {
			r := asked("good", "")
			r.RemoteAddr = proxy + ":1024"
			return status(a, r)
		}
		if got := looks(); got != 200 {
			t.Fatalf("who may look gets status %d before the flood", got)
		}
		for i := range 64 {
			all.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					r := asked(fmt.Sprint("bad ", i, " ", n), "")
					r.RemoteAddr = fmt.Sprintf("%s:%d", proxy, 2000+i)
					status(a, r)
					time.Sleep(time.Millisecond)
				}
			})
		}
		for range 3 {
			time.Sleep(reviewedFor + time.Minute) // and others are remembered since
			began := time.Now()
			if got := looks(); got != 200 || time.Since(began) > time.Second {
				t.Errorf("who may look gets status %d after %v", got, time.Since(began))
			}
		}
		revoked.Store(true)
		time.Sleep(reviewedFor)
		if got := looks(); got != 403 {
			t.Errorf("who may look no more gets status %d", got)
		}
		if key := sha256.Sum256([]byte("good")); a.trusts(key) {
			t.Error("a token is trusted after it was refused")
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
		if len(a.none) != maxReviewed {
			t.Errorf("%d answers are remembered, want %d", len(a.none), maxReviewed)
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

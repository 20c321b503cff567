package page

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// asking asks a page, from an address, what takes a time to answer, and returns the status.
func asking(ctx context.Context, p *Page, from string, answer func(*shown) (any, error)) int {
	w := httptest.NewRecorder()
	r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/search", nil)
	r.RemoteAddr = from
	p.reply(w, r, answer)
	return w.Code
}

// known is a page that needs no etcd.
func known() *Page {
	p := New(nil, Agents{}, nil)
	p.shown = &shown{}
	return p
}

// An attempt: a client asks what is dear to answer as often as it can, to slow crdsync down.
func TestAClientHasOneQuestionAnsweredAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := known()
		var at, most, answered atomic.Int32
		dear := func(*shown) (any, error) {
			most.Store(max(most.Load(), at.Add(1)))
			time.Sleep(time.Second)
			at.Add(-1)
			return nil, nil
		}
		var all sync.WaitGroup
		began := time.Now()
		for i := range 20 {
			all.Go(func() {
				switch code := asking(t.Context(), p, fmt.Sprintf("192.0.2.1:%d", 1000+i), dear); code {
				case 200:
					answered.Add(1)
				case 503:
				default:
					t.Errorf("status %d", code)
				}
			})
		}
		synctest.Wait()
		if code := asking(t.Context(), p, "192.0.2.2:1", func(*shown) (any, error) { return nil, nil }); code != 200 {
			t.Errorf("another client meanwhile: status %d", code)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("another client waited for %v", took)
		}
		all.Wait()
		if took := time.Since(began); most.Load() != 1 || answered.Load() < 4 || took > answerTimeout+time.Second {
			t.Errorf("%d at a time, %d answered in %v; want 1, 5 or so in %v", most.Load(), answered.Load(), took, answerTimeout)
		}
		if len(p.questions.of) != 0 {
			t.Errorf("%d clients are remembered that ask nothing", len(p.questions.of))
		}
	})
}

func TestWhoHasGoneIsNotAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := known()
		release := make(chan struct{})
		go asking(t.Context(), p, "192.0.2.1:1", func(*shown) (any, error) { <-release; return nil, nil })
		synctest.Wait()
		ctx, gone := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() {
			asking(ctx, p, "192.0.2.1:2", func(*shown) (any, error) {
				t.Error("it is answered after it has gone")
				return nil, nil
			})
		})
		synctest.Wait()
		gone()
		all.Wait()
		close(release)
	})
}

func TestAQuestionThatPanicsEndsItsTurn(t *testing.T) {
	p := known()
	func() {
		defer func() { _ = recover() }() // as net/http does
		asking(t.Context(), p, "192.0.2.1:1", func(*shown) (any, error) { panic("no map") })
	}()
	if code := asking(t.Context(), p, "192.0.2.1:2", func(*shown) (any, error) { return nil, nil }); code != 200 {
		t.Errorf("status %d", code)
	}
}

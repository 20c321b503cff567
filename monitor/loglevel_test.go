package monitor

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestTheLogLevelIsAnotherForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		level := NewLogLevel(slog.LevelInfo)
		log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: level}))
		logged := func() bool {
			out.Reset()
			log.Debug("x")
			return out.Len() > 0
		}
		if logged() {
			t.Error("debug is logged from the start")
		}
		level.Set(slog.LevelDebug, time.Minute)
		time.Sleep(50 * time.Second)
		level.Set(slog.LevelDebug, time.Minute) // the first minute ends nothing any more
		if time.Sleep(50 * time.Second); !logged() || !strings.Contains(level.String(), "DEBUG until ") {
			t.Errorf("after 50 s of the second minute it is %s", level)
		}
		if time.Sleep(11 * time.Second); logged() || level.String() != "INFO" {
			t.Errorf("after both it is %s", level)
		}
	})
}

func TestOnlyTheNodeItselfSetsTheLogLevel(t *testing.T) {
	for name, tt := range map[string]struct {
		method, url, header string
		status              int
		want                slog.Level
	}{
		"read":                             {"GET", "http://127.0.0.1:8481/log-level", "", 200, slog.LevelInfo},
		"read does not set":                {"GET", "http://127.0.0.1:8481/log-level?level=debug&for=1m", "1", 200, slog.LevelInfo},
		"set":                              {"PUT", "http://127.0.0.1:8481/log-level?level=debug&for=1m", "1", 200, slog.LevelDebug},
		"IPv6":                             {"PUT", "http://[::1]:8481/log-level?level=warn&for=1m", "1", 200, slog.LevelWarn},
		"by another site's page":           {"PUT", "http://127.0.0.1:8481/log-level?level=debug&for=1m", "", 400, slog.LevelInfo},
		"by a name that leads to loopback": {"PUT", "http://evil.example:8481/log-level?level=debug&for=1m", "1", 400, slog.LevelInfo},
		"no such level":                    {"PUT", "http://127.0.0.1:8481/log-level?level=loud&for=1m", "1", 400, slog.LevelInfo},
		"for ever":                         {"PUT", "http://127.0.0.1:8481/log-level?level=debug&for=9999h", "1", 400, slog.LevelInfo},
		"for no time":                      {"PUT", "http://127.0.0.1:8481/log-level?level=debug", "1", 400, slog.LevelInfo},
	} {
		t.Run(name, func(t *testing.T) {
			level := NewLogLevel(slog.LevelInfo)
			r := httptest.NewRequest(tt.method, tt.url, nil)
			if tt.header != "" {
				r.Header.Set(LevelHeader, tt.header)
			}
			w := httptest.NewRecorder()
			levelPage{level, slog.New(slog.DiscardHandler)}.ServeHTTP(w, r)
			if w.Code != tt.status || level.Level() != tt.want {
				t.Errorf("status %d, level %s: want %d, %s\n%s", w.Code, level.Level(), tt.status, tt.want, w.Body)
			}
		})
	}
}

// The page is the node's own, not that of whoever may read metrics.
func TestTheLogLevelIsNotServedToOthers(t *testing.T) {
	s := New(Config{Level: NewLogLevel(slog.LevelInfo)})
	local, remote := s.pages()
	for name, tt := range map[string]struct {
		mux  http.Handler
		want int
	}{"to the node": {local, http.StatusOK}, "to others": {remote, http.StatusNotFound}} {
		w := httptest.NewRecorder()
		if tt.mux.ServeHTTP(w, httptest.NewRequest("GET", "http://127.0.0.1/log-level", nil)); w.Code != tt.want {
			t.Errorf("%s: status %d, want %d", name, w.Code, tt.want)
		}
	}
}

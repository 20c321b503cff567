package monitor

import (
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"
)

// LogLevel is the level from which on a daemon logs. It can be changed for a while as the daemon runs; then it is what
// it was at the start again, so that debug is not left on.
type LogLevel struct {
	now   slog.LevelVar
	start slog.Level

	mu   sync.Mutex // guards what follows
	back *time.Timer
	ends time.Time // zero: the level is that of the start
}

// The bounds of how long another level lasts.
const (
	DefaultLevelTime = 10 * time.Minute
	MaxLevelTime     = 24 * time.Hour
)

// LevelHeader is a header that a request for another level has: no page of others that a browser shows can send it.
const LevelHeader = "Egret-Log-Level"

// NewLogLevel returns the level that a daemon starts with.
func NewLogLevel(start slog.Level) *LogLevel {
	l := &LogLevel{start: start}
	l.now.Set(start)
	return l
}

// Level makes a LogLevel a slog.Leveler.
func (l *LogLevel) Level() slog.Level { return l.now.Level() }

// Set makes the level another for d.
func (l *LogLevel) Set(level slog.Level, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.back != nil {
		l.back.Stop()
	}
	l.now.Set(level)
	l.ends = time.Now().Add(d)
	var back *time.Timer
	back = time.AfterFunc(d, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.back == back { // else it was set again meanwhile
			l.now.Set(l.start)
			l.back, l.ends = nil, time.Time{}
		}
	})
	l.back = back
}

// String says what the level is, and until when.
func (l *LogLevel) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ends.IsZero() {
		return l.now.Level().String()
	}
	return fmt.Sprintf("%s until %s, then %s", l.now.Level(), l.ends.Format(time.TimeOnly), l.start)
}

// levelPage answers GET with the level, and PUT with level=LEVEL and for=DURATION in its query by setting it.
type levelPage struct {
	level *LogLevel
	log   *slog.Logger
}

func (p levelPage) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut {
		level, d, err := levelOf(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		p.level.Set(level, d)
		p.log.Log(r.Context(), max(level, slog.LevelWarn), "log level set", "level", level, "dur", d)
	}
	fmt.Fprintln(w, p.level)
}

func levelOf(r *http.Request) (level slog.Level, d time.Duration, err error) {
	// A browser on this node would name the site that it thinks it talks to.
	if !IsLocal(r.Host) || r.Header.Get(LevelHeader) == "" {
		return level, d, fmt.Errorf("the level is set at the loopback address itself, with a header %s: egret log-level does", LevelHeader)
	}
	q := r.URL.Query()
	if level.UnmarshalText([]byte(q.Get("level"))) != nil {
		return level, d, fmt.Errorf("level %q: want debug, info, warn or error", q.Get("level"))
	}
	if d, err = time.ParseDuration(q.Get("for")); err != nil || d <= 0 || d > MaxLevelTime {
		return level, d, fmt.Errorf("for %q: want a duration above 0 and at most %v", q.Get("for"), MaxLevelTime)
	}
	return level, d, nil
}

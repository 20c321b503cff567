package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// root holds the folders of all labs, and a lock file beside each.
const root = "/run/egret-lab"

// Lab is a running lab. Its methods may be called from several goroutines; those that change the lab wait for each
// other, and for those of other processes.
type Lab struct {
	cfg     Config
	dir     string
	ports   ports
	cluster *kubeConfig
}

// ports are where `serve` listens on 127.0.0.1.
type ports struct {
	API  int   `json:"api"`
	Etcd []int `json:"etcd"` // by member
}

// state is lab.json: everything that a later process must know and cannot read from the kernel.
type state struct {
	Config Config `json:"config"`
	Ports  ports  `json:"ports"`
	Token  string `json:"token"`
	// Ready is set at the end of Up.
	Ready bool           `json:"ready"`
	Pods  map[string]Pod `json:"pods"` // by namespace/name
	// Crashed nodes are powered off.
	Crashed map[string]bool `json:"crashed"`

	lock *os.File // held by whoever changes the lab
}

// Pod is a pod of the lab.
type Pod struct {
	Name   string            `json:"name"` // namespace/name
	Node   string            `json:"node"`
	Labels map[string]string `json:"labels,omitempty"`
	// Number is the last part of the addresses.
	Number int          `json:"number"`
	IPs    []netip.Addr `json:"ips"` // IPv4 first
}

// ErrNoLab is what Open and every method return, wrapped, when there is no lab of the name.
var ErrNoLab = errors.New("no such lab")

// Open returns the lab of that name which Up built, here or in another process.
func Open(name string) (*Lab, error) {
	l, s, err := load(name)
	if err != nil {
		return nil, err
	}
	if !s.Ready {
		return nil, fmt.Errorf("lab %q is not complete: it is being built, or its start was interrupted (then remove it with: %s)", name, downCommand(name))
	}
	return l, nil
}

func downCommand(name string) string { return "egret-lab --name " + name + " down" }

func load(name string) (*Lab, *state, error) {
	if err := checkName(name); err != nil {
		return nil, nil, err
	}
	l := &Lab{cfg: Config{Name: name}, dir: filepath.Join(root, name)}
	s, err := l.read()
	if err != nil {
		return nil, nil, err
	}
	l.cfg, l.ports = s.Config, s.Ports
	l.cfg.Log = slog.New(slog.DiscardHandler)
	l.cluster = &kubeConfig{port: s.Ports.API, token: s.Token, ca: l.path("ca.crt")}
	return l, s, nil
}

func (l *Lab) path(elem ...string) string { return filepath.Join(append([]string{l.dir}, elem...)...) }

func (l *Lab) read() (*state, error) {
	b, err := os.ReadFile(l.path("lab.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("lab %q: %w", l.cfg.Name, ErrNoLab)
	} else if err != nil {
		return nil, err
	}
	s := &state{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("reading %s: %w", l.path("lab.json"), err)
	}
	if s.Pods == nil {
		s.Pods = map[string]Pod{}
	}
	if s.Crashed == nil {
		s.Crashed = map[string]bool{}
	}
	return s, nil
}

func (l *Lab) write(s *state) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(l.path("lab.json"), append(b, '\n'))
}

// writeFile replaces a file at once, so that no reader sees half of it.
func writeFile(path string, b []byte) error {
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// change runs f with the lab locked and its state read. f writes the state back itself, before it makes what is in the
// state.
func (l *Lab) change(ctx context.Context, f func(*state) error) error {
	held, err := lock(ctx, l.cfg.Name)
	if err != nil {
		return err
	}
	defer held.Close()
	s, err := l.read()
	if err != nil {
		return err
	}
	s.lock = held
	return f(s)
}

// lock takes the lock of the lab of that name, between processes too. It is held until the file is closed, here and in
// the children that were given it.
func lock(ctx context.Context, name string) (*os.File, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	path := filepath.Join(root, name+".lock")
	for {
		if err := os.MkdirAll(root, 0o700); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // Down of the last lab has just removed root
		} else if err != nil {
			return nil, err
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil && current(f, path) {
			return f, nil
		}
		f.Close()
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for another command on lab %q: %w", name, context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}

// current reports whether path still names f: Down removes the lock file that it holds, and who waited for it must
// begin again.
func current(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// unlink removes the lock file, and the folder of all labs when this was the last. The caller holds the lock.
func unlink(name string) error {
	err := os.Remove(filepath.Join(root, name+".lock"))
	os.Remove(root) // fails while there is another lab, as it should
	return err
}

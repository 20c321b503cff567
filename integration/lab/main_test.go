package lab_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/store"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// upVariable names a lab that the test binary builds instead of running tests.
const upVariable = "EGRET_LAB_TEST_UP"

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	if len(os.Args) > 1 && (os.Args[1] == "agent" || os.Args[1] == "crdsync") {
		if err := standIn(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if name := os.Getenv(upVariable); name != "" {
		_, err := lab.Up(context.Background(), lab.Config{Name: name, Bare: true})
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// standIn stands for egret where a test is about the lab: it writes the record that Up waits for, and stays.
func standIn(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	keys := []string{store.NodeKey(lab.NodeName(1)), store.NodeKey(lab.NodeName(2))}
	flags := map[string]string{}
	for i := 1; i+1 < len(args); i += 2 {
		flags[args[i]] = args[i+1]
	}
	if args[0] == "agent" {
		keys = []string{store.AgentKey(flags["--node"])}
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{flags["--endpoints"]}, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer client.Close()
	for _, key := range keys {
		if _, err := client.Put(ctx, "/egret/"+key, "{}"); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}

// needLab skips a test where no lab can be built.
func needLab(t *testing.T) {
	t.Helper()
	need.Root(t)
	need.KubeProgram(t, "kube-apiserver")
}

// uniqueName returns a lab name that no other run has, and checks at the end that nothing of the lab is left.
func uniqueName(t *testing.T, what string) string {
	t.Helper()
	name := lab.OwnName("test-" + what)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if left := leftovers(name); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
		if err := lab.Down(ctx, name); err != nil {
			t.Errorf("removing the rest: %v", err)
		}
	})
	return name
}

// up builds a lab that is removed at the end of the test.
func up(t *testing.T, cfg lab.Config) *lab.Lab {
	t.Helper()
	l, err := lab.Up(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := l.Down(ctx); err != nil {
			t.Errorf("removing lab %s: %v", l.Name(), err)
		}
	})
	return l
}

// leftovers returns the files, namespaces and processes of a lab. Its processes have its folder as working directory.
func leftovers(name string) []string {
	var left []string
	for _, pattern := range []string{"/run/egret-lab/" + name + "*", "/run/netns/egret-" + name + "-*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			panic(err) // the pattern
		}
		left = append(left, found...)
	}
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		panic(err)
	}
	for _, link := range links {
		dir, err := os.Readlink(link)
		if err == nil && strings.HasPrefix(dir, "/run/egret-lab/"+name) {
			left = append(left, link)
		}
	}
	return left
}

// waitFor returns when a file is there.
func waitFor(t *testing.T, file string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		_, err := os.Stat(file)
		if err == nil {
			return
		}
		if !errors.Is(err, fs.ErrNotExist) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	clientsnapshot "go.etcd.io/etcd/client/v3/snapshot"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/egret-project/egret/store"
)

// answerTimeout is how long a member has to say that it is there.
const answerTimeout = 5 * time.Second

// taking is the configuration of `egret-etcd snapshot`.
type taking struct {
	endpoints         []string
	certs, serverName string
	dir               string
	keep              int
	timeout           time.Duration
}

func snapshotCommand() *cobra.Command {
	var s taking
	c := &cobra.Command{
		Use:   "snapshot",
		Short: "Take a snapshot of etcd, look whether it is whole, and remove old ones",
		Long: "Takes a snapshot from the first endpoint that gives one, as DIR/egret-TIME.db. Where etcd has users, it takes one with the role root.\n" +
			"`egret-etcd run --restore-from` begins with it.",
		Args: cobra.NoArgs,
	}
	f := c.Flags()
	f.StringSliceVar(&s.endpoints, "endpoints", []string{"https://127.0.0.1:8483"}, "URLs of etcd's members, comma separated")
	f.StringVar(&s.certs, "certs", "/etc/egret/etcd", "directory with ca.crt, tls.crt and tls.key")
	f.StringVar(&s.serverName, "etcd-server-name", "", "name that etcd's certificate is to have (default: the host of the endpoint)")
	f.StringVar(&s.dir, "dir", ".", "directory of the snapshots")
	f.IntVar(&s.keep, "keep", 7, "how many snapshots of this directory to keep; 0: all")
	f.DurationVar(&s.timeout, "timeout", 5*time.Minute, "how long it may take")
	c.RunE = func(c *cobra.Command, _ []string) error { return s.run(c.Context(), c.OutOrStdout()) }
	return c
}

func (s *taking) run(ctx context.Context, w io.Writer) error {
	if s.keep < 0 {
		return fmt.Errorf("--keep %d: want 0 or more", s.keep)
	}
	info := transport.TLSInfo{
		CertFile: filepath.Join(s.certs, "tls.crt"), KeyFile: filepath.Join(s.certs, "tls.key"), TrustedCAFile: filepath.Join(s.certs, "ca.crt"),
	}
	tls, err := info.ClientConfig()
	if err != nil {
		return fmt.Errorf("reading --certs: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	file := filepath.Join(s.dir, "egret-"+time.Now().UTC().Format("20060102T150405.000Z")+".db")
	var errs []error
	for _, endpoint := range s.endpoints {
		endpoint = store.Endpoint(endpoint) // the chart makes it of a variable with the address of a Service
		cfg := clientv3.Config{Endpoints: []string{endpoint}, TLS: tls, DialTimeout: answerTimeout, Logger: zap.NewNop()}
		if s.serverName != "" { // gRPC checks the host that is dialed, whatever TLSInfo says
			cfg.DialOptions = []grpc.DialOption{grpc.WithAuthority(s.serverName)}
		}
		// A member that is not there would use up all the time.
		if err := answers(ctx, cfg); err != nil {
			errs = append(errs, fmt.Errorf("asking %s: %w", endpoint, err))
			continue
		}
		// It is written beside its place and moved when it is whole.
		if _, err := clientsnapshot.SaveWithVersion(ctx, zap.NewNop(), cfg, file); err != nil {
			errs = append(errs, fmt.Errorf("taking a snapshot from %s: %w", endpoint, err))
			_ = os.Remove(file + ".part") // where it came to that
			continue
		}
		status, err := snapshot.NewV3(zap.NewNop()).Status(file)
		if err != nil {
			return fmt.Errorf("reading the snapshot %s: %w", file, err)
		}
		fmt.Fprintf(w, "%s: revision %d, %d keys, %d bytes, from %s\n", file, status.Revision, status.TotalKey, status.TotalSize, endpoint)
		return s.clean(w)
	}
	return errors.Join(errs...)
}

func answers(ctx context.Context, cfg clientv3.Config) error {
	c, err := clientv3.New(cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	_, err = c.Status(ctx, cfg.Endpoints[0])
	return err
}

// clean removes the oldest snapshots. Their names are in the order of their times.
func (s *taking) clean(w io.Writer) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	var files []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "egret-") && strings.HasSuffix(e.Name(), ".db") {
			files = append(files, e.Name())
		}
	}
	slices.Sort(files)
	for s.keep > 0 && len(files) > s.keep {
		if err := os.Remove(filepath.Join(s.dir, files[0])); err != nil {
			return err
		}
		fmt.Fprintf(w, "%s: removed\n", files[0])
		files = files[1:]
	}
	return nil
}

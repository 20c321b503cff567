package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/operator"
)

func logLevelCommand() *cobra.Command {
	var address string
	var lasts time.Duration
	c := &cobra.Command{
		Use:   "log-level [debug|info|warn|error]",
		Short: "Read the level of a running daemon's log, or make it another for a while",
		Long: "Asks the agent of this node, or with --status-address another daemon, in whose network namespace it runs. In a cluster:\n" +
			"kubectl exec -n NAMESPACE POD -- egret log-level debug --for 10m",
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"debug", "info", "warn", "error"},
		RunE: func(c *cobra.Command, args []string) error {
			if lasts <= 0 || lasts > monitor.MaxLevelTime {
				return fmt.Errorf("--for %v: want a duration above 0 and at most %v", lasts, monitor.MaxLevelTime)
			}
			if !monitor.IsLocal(address) {
				return fmt.Errorf("--status-address %q: want a loopback address and a port, like 127.0.0.1:%d for crdsync", address, egress.SyncStatusPort)
			}
			level := ""
			if len(args) > 0 {
				level = args[0]
			}
			answer, err := askLevel(c.Context(), address, level, lasts)
			if err == nil {
				fmt.Fprintln(c.OutOrStdout(), answer)
			}
			return err
		},
	}
	c.Flags().StringVar(&address, "status-address", fmt.Sprintf("127.0.0.1:%d", egress.StatusPort),
		fmt.Sprintf("what the daemon has as --status-address; crdsync's is 127.0.0.1:%d", egress.SyncStatusPort))
	c.Flags().DurationVar(&lasts, "for", monitor.DefaultLevelTime, "how long the level lasts; then it is again what the daemon was started with")
	return c
}

// askLevel reads the level of the daemon at address, or sets it.
func askLevel(ctx context.Context, address, level string, lasts time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	method, query := http.MethodGet, url.Values{}
	if level != "" {
		method, query = http.MethodPut, url.Values{"level": {level}, "for": {lasts.String()}}
	}
	page := url.URL{Scheme: "http", Host: address, Path: "/log-level", RawQuery: query.Encode()}
	r, err := http.NewRequestWithContext(ctx, method, page.String(), nil)
	if err != nil {
		return "", err
	}
	r.Header.Set(monitor.LevelHeader, "set")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", fmt.Errorf("asking the daemon at %s: %w: it runs in another network namespace, or with another --status-address", address, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	answer := operator.Printable(strings.TrimSpace(string(b)), 4<<10) // while no daemon has the address, any process of the node can
	switch {
	case err != nil:
		return "", fmt.Errorf("reading the answer of the daemon at %s: %w", address, err)
	case resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusMethodNotAllowed:
		return "", errors.New("the daemon is of a version whose log level cannot be changed")
	case resp.StatusCode != http.StatusOK:
		return "", fmt.Errorf("the daemon at %s: %s", address, answer)
	}
	return answer, nil
}

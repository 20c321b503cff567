package store

import (
	"context"
	"crypto/tls"
	"net"

	"google.golang.org/grpc/credentials"
)

// Reloading makes connections with the configuration that read returns at the time of each of them: so CAs and
// certificates that are replaced need no restart. Where it cannot be read the connection fails, and gRPC tries again.
// There are hooks of crypto/tls for less of it, but the one that could take other CAs is not told which address was
// dialed.
func Reloading(read func() (*tls.Config, error)) credentials.TransportCredentials {
	return reloading{credentials.NewTLS(nil), read}
}

type reloading struct {
	credentials.TransportCredentials // Info and ServerHandshake
	read                             func() (*tls.Config, error)
}

func (r reloading) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := r.read()
	if err != nil {
		return nil, nil, err
	}
	if cfg.ServerName != "" { // gRPC would check the host that was dialed
		authority = cfg.ServerName
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
}

func (r reloading) Clone() credentials.TransportCredentials { return r }

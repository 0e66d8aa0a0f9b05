// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// restartGrace is how long the API server may take to stop before it is restarted.
const restartGrace = 2 * time.Second

// WithoutAPIServer stops the API server, calls f, and starts the API server again
// with the same address, certificates and data. It returns when the API server is
// usable again, even if f ends its goroutine, as a failing test does.
func (c *Cluster) WithoutAPIServer(ctx context.Context, f func()) (err error) {
	// The API server stops listening at once, but waits up to a minute for watches
	// to end.
	kill := time.AfterFunc(restartGrace, c.apiServer.kill)
	defer kill.Stop()
	if err := c.plane.APIServer.Stop(); err != nil {
		return fmt.Errorf("stop kube-apiserver: %w", err)
	}
	defer func() {
		if startErr := c.restartAPIServer(context.WithoutCancel(ctx)); startErr != nil {
			err = errors.Join(err, fmt.Errorf("restart kube-apiserver: %w", startErr))
		}
	}()
	f()
	return nil
}

// restartAPIServer starts the stopped API server.
func (c *Cluster) restartAPIServer(ctx context.Context) error {
	// Otherwise envtest would pass all arguments twice.
	c.plane.APIServer.Args = nil //nolint:staticcheck // deprecated, but envtest uses it itself
	if err := c.apiServer.start(ctx, c.plane.APIServer.Start); err != nil {
		return err
	}
	// envtest polls /healthz, which succeeds before the API server has loaded the
	// RBAC rules.
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return poll(ctx, func() (bool, error) {
		_, err := c.client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err == nil, nil
	})
}

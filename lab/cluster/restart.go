// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// restartGrace is how long the API server may take to stop when it is going to be
// started again.
const restartGrace = 2 * time.Second

// WithoutAPIServer stops the API server, calls f while it is away, and starts it
// again at the same address, with the same certificates and the same content. It
// returns once the API server can be used, also when f ends its goroutine, as a
// test that fails does.
func (c *Cluster) WithoutAPIServer(ctx context.Context, f func()) (err error) {
	// It no longer listens from the moment that it is told to stop, but waits a
	// minute for watches to end by themselves.
	kill := time.AfterFunc(restartGrace, c.apiServer.kill)
	defer kill.Stop()
	if err := c.plane.APIServer.Stop(); err != nil {
		return fmt.Errorf("stop kube-apiserver: %w", err)
	}
	defer func() {
		if startErr := c.restartAPIServer(context.WithoutCancel(ctx)); startErr != nil {
			err = errors.Join(err, fmt.Errorf("start kube-apiserver again: %w", startErr))
		}
	}()
	f()
	return nil
}

// restartAPIServer starts the API server, which has been stopped.
func (c *Cluster) restartAPIServer(ctx context.Context) error {
	// Otherwise envtest would give it all arguments twice.
	c.plane.APIServer.Args = nil //nolint:staticcheck // deprecated, but envtest uses it itself
	if err := c.apiServer.start(ctx, c.plane.APIServer.Start); err != nil {
		return err
	}
	// envtest asks for /healthz, which does not wait until the API server has
	// read who may do what.
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return poll(ctx, func() (bool, error) {
		_, err := c.client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err == nil, nil
	})
}

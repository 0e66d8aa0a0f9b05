// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// counter is a ConfigMap whose number the administrator raises during a rollout.
const counter = "counter"

// awayAtMost is how long a client may need to watch again, through the same replica: as
// long as that needs to exit and to start, and the client's node to find it again.
const awayAtMost = time.Minute

// During an upgrade, each replica restarts. Its watches end within the grace period, their
// clients are told, and a client that watches again misses nothing.
func (i *installation) upgrade() {
	if i.audited(replicas[0]) {
		i.Error("the audit log names the device before the option is set")
	}
	c := i.count()
	i.helm(append([]string{"upgrade", release}, i.values("--set", "options.audit=true")...)...)
	i.rollout()
	c.finish()
	if !i.audited(replicas[0]) {
		i.Error("the upgrade has no effect: the audit log does not name the device")
	}
}

// The rollback takes rights away that the replicas use until they restart, so their callers
// are refused meanwhile: see the chart's README.
func (i *installation) rollback() {
	i.helm("rollback", release, "1", "--namespace", namespace)
	i.rollout()
	if i.audited(replicas[0]) {
		i.Error("the rollback has no effect: the audit log still names the device")
	}
}

// count is a rollout with a counter that is raised, and clients that follow it.
type count struct {
	*installation
	watcher string // the kubeconfig of kubectl's watch
	// first and second are clients of the replicas.
	first, second kubernetes.Interface
	stop          context.CancelFunc
	running       sync.WaitGroup

	mu       sync.Mutex
	raised   int
	seen     int                  // the last number that the follower has seen
	seenAt   time.Time            // when
	away     time.Duration        // the longest time between two numbers
	deleted  map[string]time.Time // when a replica's pod was asked to end
	ended    time.Time            // when the watch that is not opened again ended
	endedHow error
	requests int
	unserved int // requests that neither replica answered
	why      error
}

// count begins to raise the counter, and opens what follows it.
func (i *installation) count() *count {
	i.Helper()
	ctx, cancel := context.WithCancel(i.Context())
	c := &count{
		installation: i, stop: cancel, deleted: make(map[string]time.Time),
		watcher: i.kubeconfig("bob", replicas[0]), first: i.client("bob", replicas[0]), second: i.client("bob", replicas[1]),
	}
	i.kubectl("create", "configmap", counter, "--from-literal=n=0")
	// Each is its own goroutine. None may fail the test itself.
	open := make(chan error, 2)
	c.running.Go(func() { c.note(c.noteDeletions(ctx)) })
	c.running.Go(func() { c.note(c.follow(ctx, open)) })
	c.running.Go(func() { c.note(c.plainWatch(ctx, open)) })
	c.running.Go(func() { c.request(ctx) })
	if err := errors.Join(<-open, <-open); err != nil {
		i.Fatal(err)
	}
	c.running.Go(func() { c.note(c.raise(ctx)) })
	i.until("the counter is followed", func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.seen < 3 || c.requests < 3 {
			return fmt.Errorf("%d was seen, there were %d requests", c.seen, c.requests)
		}
		return nil
	})
	return c
}

// note keeps an error for finish, unless the end of the count is the reason.
func (c *count) note(err error) {
	if err == nil || errors.Is(err, context.Canceled) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.why = errors.Join(c.why, err)
}

// raise raises the counter ten times a second.
func (c *count) raise(ctx context.Context) error {
	for tick := time.NewTicker(100 * time.Millisecond); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		c.mu.Lock()
		next := c.raised + 1
		c.mu.Unlock()
		if _, err := c.admin.CoreV1().ConfigMaps("default").Update(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: counter}, Data: map[string]string{"n": strconv.Itoa(next)},
		}, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("raise the counter: %w", err)
		}
		c.mu.Lock()
		c.raised = next
		c.mu.Unlock()
	}
}

// follow watches the counter through the first replica, and again when a watch ends, as
// controllers do. It fails if it misses a number.
func (c *count) follow(ctx context.Context, open chan<- error) error {
	maps := c.first.CoreV1().ConfigMaps("default")
	now, err := maps.Get(ctx, counter, metav1.GetOptions{})
	open <- err
	if err != nil {
		return err
	}
	watcher, err := watchtools.NewRetryWatcherWithContext(ctx, now.ResourceVersion, &cache.ListWatch{
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			options.FieldSelector = fields.OneTermEqualSelector("metadata.name", counter).String()
			return maps.Watch(ctx, options)
		},
	})
	if err != nil {
		return err
	}
	defer watcher.Stop()
	for {
		var event watch.Event
		var ok bool
		select {
		case <-ctx.Done():
			return nil
		case event, ok = <-watcher.ResultChan():
		}
		if ctx.Err() != nil || event.Type == watch.Deleted {
			return nil
		}
		m, isMap := event.Object.(*corev1.ConfigMap)
		if !ok || !isMap {
			return fmt.Errorf("the watch that is opened again has ended: %v", event)
		}
		n, err := strconv.Atoi(m.Data["n"])
		if err != nil {
			return err
		}
		c.mu.Lock()
		missed := n != c.seen+1
		if c.seen > 0 {
			c.away = max(c.away, time.Since(c.seenAt))
		}
		c.seen, c.seenAt = n, time.Now()
		c.mu.Unlock()
		if missed {
			return fmt.Errorf("the watch missed what was before %d", n)
		}
	}
}

// plainWatch is a kubectl that watches through the first replica until that restarts.
func (c *count) plainWatch(ctx context.Context, open chan<- error) error {
	cmd, err := lab.Kubectl(ctx, c.watcher, "get", "configmap", counter, "--watch", "--output=name")
	if err != nil {
		open <- err
		return err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = out.Read(make([]byte, 1)) // the first event
	}
	open <- err
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, out) // until it ends, as Wait says how
	if err = cmd.Wait(); err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.String())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended, c.endedHow = time.Now(), err
	return nil
}

// request sends a request four times a second to the first replica, or to the second if
// the first does not answer.
func (c *count) request(ctx context.Context) {
	for tick := time.NewTicker(250 * time.Millisecond); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var errs []error
		for _, client := range []kubernetes.Interface{c.first, c.second} {
			limit := 5 * time.Second
			if client == c.second {
				limit = 30 * time.Second // nobody else is left, and it may have just restarted
			}
			limited, cancel := context.WithTimeout(ctx, limit)
			_, err := client.CoreV1().ConfigMaps("default").Get(limited, counter, metav1.GetOptions{})
			cancel()
			if err == nil {
				errs = nil
				break
			}
			errs = append(errs, err)
		}
		if ctx.Err() != nil {
			return
		}
		c.mu.Lock()
		c.requests++
		if errs != nil {
			c.unserved++
			c.why = errors.Join(c.why, fmt.Errorf("neither replica answers: %w", errors.Join(errs...)))
		}
		c.mu.Unlock()
	}
}

// noteDeletions notes when each replica's pod is asked to end.
func (c *count) noteDeletions(ctx context.Context) error {
	pods, err := c.admin.CoreV1().Pods(namespace).Watch(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/instance=" + release})
	if err != nil {
		return err
	}
	defer pods.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case event, ok := <-pods.ResultChan():
			pod, isPod := event.Object.(*corev1.Pod)
			if !ok || !isPod {
				return fmt.Errorf("the watch of the pods has ended: %v", event)
			}
			c.mu.Lock()
			if _, noted := c.deleted[pod.Name]; pod.DeletionTimestamp != nil && !noted {
				c.deleted[pod.Name] = time.Now()
			}
			c.mu.Unlock()
		}
	}
}

// finish ends the count, and says what became of the clients.
func (c *count) finish() {
	c.Helper()
	c.until("the watch that is opened again is there", func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.seen < c.raised-20 && c.why == nil {
			return fmt.Errorf("it has seen %d of %d", c.seen, c.raised)
		}
		return nil
	})
	c.stop()
	c.running.Wait()
	c.kubectl("delete", "configmap", counter)

	began, restarted := c.deleted[replicas[0]]
	if c.why != nil || !restarted || len(c.deleted) != len(replicas) {
		c.Fatalf("the pods %v have restarted: %v", c.deleted, c.why)
	}
	c.Logf("a watch ended %.1f s after its replica was asked to exit, with %v; one that is opened again was away for %.1f s, and missed none of %d changes; of %d requests, %d were answered by neither replica",
		c.ended.Sub(began).Seconds(), c.endedHow, c.away.Seconds(), c.seen, c.requests, c.unserved)
	// That the pod is asked to exit is noticed at the same time as kubelet does, or later.
	if took := c.ended.Sub(began); c.endedHow != nil || took < -2*time.Second || took > gracePeriod {
		c.Errorf("the watch ended %v after its replica was asked to exit, with %v; want within %v, with exit code 0", took, c.endedHow, gracePeriod)
	}
	if c.away > awayAtMost {
		c.Errorf("the watch that is opened again was away for %v; want at most %v", c.away, awayAtMost)
	}
}

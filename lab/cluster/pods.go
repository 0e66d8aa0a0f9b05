// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/kubelet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
)

const (
	// NodeName is the name of the cluster's node.
	NodeName = node.Name

	// ContainerName is the name of the only container of every pod.
	ContainerName = "main"
)

// startNode creates the node and starts watching its pods.
func (c *Cluster) startNode(ctx context.Context) error {
	now := metav1.Now()
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: NodeName, Labels: map[string]string{corev1.LabelHostname: NodeName}},
		Status: corev1.NodeStatus{
			Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: "127.0.0.1"},
				{Type: corev1.NodeHostName, Address: NodeName},
			},
			Capacity: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("110")},
			Conditions: []corev1.NodeCondition{{
				Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady",
				LastHeartbeatTime: now, LastTransitionTime: now,
			}},
			DaemonEndpoints: corev1.NodeDaemonEndpoints{
				KubeletEndpoint: corev1.DaemonEndpoint{Port: int32(c.kubelet.Port())}, //nolint:gosec // a port fits
			},
		},
	}
	if _, err := c.client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create node: %w", err)
	}
	// The API server creates this namespace itself, shortly after it is ready.
	err := poll(ctx, func() (bool, error) {
		_, err := c.client.CoreV1().Namespaces().Get(ctx, metav1.NamespaceDefault, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return fmt.Errorf("wait for namespace %s: %w", metav1.NamespaceDefault, err)
	}
	if c.watch, err = watchPods(ctx, c.client, c.kubelet); err != nil {
		return fmt.Errorf("watch pods: %w", err)
	}
	return nil
}

// RunPod creates a pod whose only container runs command: on a real node with
// [node.Busybox], otherwise as a process on this machine. It returns when the process
// runs and the pod's status says so. The namespace has to exist.
func (c *Cluster) RunPod(ctx context.Context, namespace, name string, command []string) error {
	if c.node != nil {
		return c.runRealPod(ctx, namespace, name, command)
	}
	pods := c.client.CoreV1().Pods(namespace)
	pod, err := pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			NodeName: NodeName,
			Containers: []corev1.Container{{
				Name:    ContainerName,
				Image:   "lab.example/process", // not a real image
				Command: command,
				Stdin:   true,
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("run pod %s/%s: %w", namespace, name, err)
	}
	err = c.watch.begin(pod)
	if err == nil {
		pod.Status = runningStatus(pod)
		_, err = pods.UpdateStatus(ctx, pod, metav1.UpdateOptions{})
	}
	if err != nil {
		c.watch.end(pod)
		return errors.Join(
			fmt.Errorf("run pod %s/%s: %w", namespace, name, err),
			deletePod(context.WithoutCancel(ctx), c.client, pod))
	}
	return nil
}

// runningStatus returns the status of a pod that runs.
func runningStatus(pod *corev1.Pod) corev1.PodStatus {
	now := metav1.Now()
	started := true
	status := corev1.PodStatus{
		Phase:     corev1.PodRunning,
		HostIP:    "127.0.0.1",
		PodIP:     "127.0.0.1",
		PodIPs:    []corev1.PodIP{{IP: "127.0.0.1"}},
		StartTime: &now,
		ContainerStatuses: []corev1.ContainerStatus{{
			Name:        ContainerName,
			Image:       pod.Spec.Containers[0].Image,
			ContainerID: "lab://" + string(pod.UID),
			Ready:       true,
			Started:     &started,
			State:       corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
		}},
	}
	for _, condition := range []corev1.PodConditionType{
		corev1.PodScheduled, corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady,
	} {
		status.Conditions = append(status.Conditions, corev1.PodCondition{
			Type: condition, Status: corev1.ConditionTrue, LastTransitionTime: now,
		})
	}
	return status
}

// podWatch runs pods and ends those that are being deleted. The API server only
// marks a pod as deleted; the kubelet then kills its processes and removes the
// object.
type podWatch struct {
	client  kubernetes.Interface
	kubelet *kubelet.Server
	factory informers.SharedInformerFactory

	ctx    context.Context // cancelled by stop
	cancel context.CancelFunc

	// An event about a deleted pod may arrive when a new pod has its name, so pods
	// are told apart by UID.
	mu   sync.Mutex
	pods map[types.NamespacedName]types.UID
}

// watchPods starts a podWatch.
func watchPods(ctx context.Context, client kubernetes.Interface, k *kubelet.Server) (*podWatch, error) {
	w := &podWatch{client: client, kubelet: k, pods: make(map[types.NamespacedName]types.UID)}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.factory = informers.NewSharedInformerFactoryWithOptions(client, 0,
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", NodeName).String()
		}))
	informer := w.factory.Core().V1().Pods().Informer()
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    w.changed,
		UpdateFunc: func(_, obj any) { w.changed(obj) },
		DeleteFunc: w.deleted,
	})
	if err != nil {
		w.stop()
		return nil, err
	}
	w.factory.Start(w.ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		w.stop()
		return nil, context.Cause(ctx)
	}
	return w, nil
}

// changed ends a pod that is marked as deleted.
func (w *podWatch) changed(obj any) {
	if pod, ok := obj.(*corev1.Pod); ok && pod.DeletionTimestamp != nil {
		w.end(pod)
		// If this fails, the pod is gone or the cluster is stopping.
		_ = deletePod(w.ctx, w.client, pod)
	}
}

// deleted ends a pod that was removed at once: --force does not wait for the
// kubelet.
func (w *podWatch) deleted(obj any) {
	if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = last.Obj
	}
	if pod, ok := obj.(*corev1.Pod); ok {
		w.end(pod)
	}
}

// begin starts the processes of a pod.
func (w *podWatch) begin(pod *corev1.Pod) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	name := podName(pod)
	if _, ok := w.pods[name]; ok { // deleted, but its event has not arrived
		w.kubelet.RemovePod(pod.Namespace, pod.Name)
		delete(w.pods, name)
	}
	err := w.kubelet.AddPod(pod.Namespace, pod.Name, ContainerName, pod.Spec.Containers[0].Command)
	if err != nil {
		return err
	}
	w.pods[name] = pod.UID
	return nil
}

// end kills the processes of a pod, if it has any.
func (w *podWatch) end(pod *corev1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if name := podName(pod); w.pods[name] == pod.UID {
		w.kubelet.RemovePod(pod.Namespace, pod.Name)
		delete(w.pods, name)
	}
}

// stop stops the watch and waits until it has ended.
func (w *podWatch) stop() {
	w.cancel()
	w.factory.Shutdown()
}

// podName returns the full name of a pod.
func podName(pod *corev1.Pod) types.NamespacedName {
	return types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}
}

// deletePod deletes a pod at once.
func deletePod(ctx context.Context, client kubernetes.Interface, pod *corev1.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	opts := metav1.NewDeleteOptions(0)
	opts.Preconditions = metav1.NewUIDPreconditions(string(pod.UID))
	return client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, *opts)
}

// poll calls done until it reports true, fails, or ctx ends.
func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

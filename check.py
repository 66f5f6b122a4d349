"""What deploy.py would do to each host, and what stands in its way; changes nothing.

./run pyinfra INVENTORY check.py -y
./run pyinfra INVENTORY check.py -y --data report_format=json   (one line of JSON a host on stdout)
"""

from tasks import preflight

preflight.plan()
